//! Training data: the ingested dataset on disk, decoded pictures, and the order in which samples are drawn.
//!
//! Knows no model family. Called by the families (to fill their caches), by [`crate::run`] (for the order) and, through
//! the catalogue, by the server's uploads (to judge pictures).

mod bucket;
mod caption;
mod items;
mod options;
mod order;
mod picture;
mod store;

pub use bucket::{BucketConfig, Buckets, Placement};
pub use caption::CaptionConfig;
pub use items::{dataset_fingerprint, read_items};
pub use options::{DataConfig, FIELDS, contradictions, fill_defaults};
pub use order::{Order, Window};
pub use picture::{
    Framing, decode, decode_as, decode_with_alpha, inspect_image, mask_tensor, near_black_share, to_tensor,
};
pub use store::{Key, TensorCache};
