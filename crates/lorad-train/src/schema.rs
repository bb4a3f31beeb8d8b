//! One declaration of a hyperparameter: feeds JSON Schema, validation and docs.
