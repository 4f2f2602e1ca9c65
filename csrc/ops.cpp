// The operators' schemas, and the empty Python module whose import registers everything.
#include <Python.h>
#include <torch/library.h>

TORCH_LIBRARY(hvd_lbt, library) {
  library.def(
      "fused_sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momenta, *, float lr, "
      "float momentum, float weight_decay, bool nesterov, bool maximize, Tensor? grad_scale, "
      "Tensor? found_inf) -> ()");
  library.def(
      "pack_wire_(Tensor(a!)[] wires, Tensor[] sources, Tensor scale, Tensor(b!) overflow, "
      "*, int summands=1) -> ()");
  library.def("unpack_wire_(Tensor(a!)[] targets, Tensor[] wires, Tensor scale) -> ()");
  // Name of the CPU instruction set in use; with `choose`, use that one from now on.
  library.def("cpu_isa(str? choose=None) -> str");
}

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
