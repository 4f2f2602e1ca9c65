// The momentum update of one element (Sutskever's form, as torch.optim.SGD has it).
#pragma once

#include "rule.h"

namespace hvd_lbt {

// What is the same for every element of a call.
struct SgdSettings {
  float lr;            // learning rate
  float momentum;      // m of b <- m b + g
  float weight_decay;  // the decay's share of the weight, added to the gradient
  bool has_momentum;   // false: w <- w - lr g and no momentum buffer is touched
  bool has_scale;      // the gradient is divided by grad_scale first
  bool nesterov;       // step along g + m b, not along b
  bool maximize;       // climb: the gradient's sign is turned before the decay is added
};

inline SgdSettings sgd_settings(double lr, double momentum, double weight_decay, bool has_momentum,
                                bool has_scale, bool nesterov, bool maximize) {
  return {static_cast<float>(lr),
          static_cast<float>(momentum),
          static_cast<float>(weight_decay),
          has_momentum,
          has_scale,
          nesterov,
          maximize};
}

// g <- +-g / scale + weight_decay w;  b <- m b + g;  w <- w - lr (g + m b  or  b  or  g).
// V is float or a vector of floats. Built without contraction to fused multiply-adds, so that every
// instruction set gives the same bits.
template <class V>
HVD_RULE void sgd_rule(V& weight, V gradient, V& buffer, float grad_scale, const SgdSettings& s) {
  if (s.has_scale) gradient = gradient / grad_scale;
  if (s.maximize) gradient = -gradient;
  if (s.weight_decay != 0.0f) gradient = gradient + weight * s.weight_decay;
  if (s.has_momentum) {
    buffer = buffer * s.momentum + gradient;
    gradient = s.nesterov ? gradient + buffer * s.momentum : buffer;
  }
  weight = weight - gradient * s.lr;
}

}  // namespace hvd_lbt
