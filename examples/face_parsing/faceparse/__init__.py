"""The face parser of the paper: data, models, training, inference, reporting."""
