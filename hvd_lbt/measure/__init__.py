"""What a training can tell about itself: the noise of its gradients, the evidence for its minimum."""
