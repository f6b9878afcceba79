"""The program around the method: flags, runs, training, scores, predictions, pictures, logs."""
