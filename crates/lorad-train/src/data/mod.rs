//! Training data: the ingested dataset on disk, decoded pictures, and the order in which samples are drawn.
//!
//! Knows no model family. Called by the families (to fill their caches), by [`crate::run`] (for the order) and, through
//! the catalogue, by the server's uploads (to judge pictures).

mod items;
mod order;
mod picture;

pub use items::{dataset_fingerprint, read_items};
pub use order::{Order, Window};
pub use picture::{Framing, decode, inspect_image, near_black_share, to_tensor};
