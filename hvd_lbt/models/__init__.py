"""Networks, with torchvision's parameter names."""
