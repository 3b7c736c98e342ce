"""Resource plans of training runs and endpoints, and simulations of serving, data jobs and training."""
