//! Training state: step, cursor, optimizer.
