"""One page from evaluation results and training runs."""
