"""Tells why several devices refuse derivatives in forward mode, whose levels torch counts for the whole process."""

WHY_REFUSED = (
    "Forward-mode derivatives (torch.func.jvp, jacfwd, hessian, torch.autograd.forward_ad) work for one thread of a "
    "process at a time, so they cannot be part of what several devices run. Use torch.func.vjp or jacrev, or "
    "torch.autograd.functional.jvp"
)
