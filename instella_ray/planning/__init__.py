"""Resource plans of training runs, and simulations of serving, data jobs and training."""
