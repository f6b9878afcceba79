"""Training, a run's folder, testing, predicting, and the pictures they draw."""
