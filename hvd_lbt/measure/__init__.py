"""What a training measures about itself: gradient noise, evidence for its minimum."""
