//! Model families. A new one is one folder and one line in [`FAMILIES`].

pub mod sd1;

use crate::task::Family;

/// The registry.
pub static FAMILIES: &[&dyn Family] = &[];
