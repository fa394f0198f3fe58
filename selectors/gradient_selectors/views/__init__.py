"""What selectors read: lazy views of a pool's gradients, seen from a target."""
