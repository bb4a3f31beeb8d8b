//! The on-disk form of an ingested dataset, and the verdicts on its files.
//!
//! ```text
//! <dataset>/items.jsonl      one [`Item`] a line, in order of `n`
//! <dataset>/files/00000.png  the uploaded bytes under a generated name
//! <dataset>/thumbs/00000.png re-encoded, at most 256 px
//! <dataset>/report.json      a [`Report`]
//! ```

use serde::{Deserialize, Serialize};

/// One training item.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Item {
    /// From 0, the order of the names in the archive.
    pub n: u32,
    /// Generated name under `files/`.
    pub file: String,
    /// Name in the upload, for people.
    pub source: String,
    /// Caption.
    pub caption: String,
    /// Pixels, after EXIF rotation.
    pub width: u32,
    /// Pixels, after EXIF rotation.
    pub height: u32,
    /// Size of the file.
    pub bytes: u64,
    /// SHA-256 of the file, hex.
    pub sha256: String,
}

/// What was found in an upload.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Report {
    /// One per file in the upload, in order of name.
    pub files: Vec<FileVerdict>,
    /// Usable items.
    pub n_items: u32,
    /// Items whose bytes equal an earlier item's.
    pub n_duplicates: u32,
    /// Items without a caption (allowed with a warning only where the format allows it).
    pub n_uncaptioned: u32,
    /// Longest caption, characters.
    pub max_caption_chars: u32,
    /// Smallest and largest sides, pixels.
    pub min_side: u32,
    /// Largest side, pixels.
    pub max_side: u32,
}

/// What was found about one file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileVerdict {
    /// Name in the upload.
    pub file: String,
    /// Verdict.
    pub verdict: Verdict,
    /// Stable code when not `ok`: `image.truncated`, `image.too_large`, `image.unsupported_format`, `caption.no_image`, …
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
    /// One sentence, when not `ok`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

/// Verdict on a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Used.
    Ok,
    /// Used, but look at it.
    Warning,
    /// Not data (e.g. `__MACOSX/`, `.DS_Store`, `README.md`).
    Ignored,
    /// The upload is refused because of it.
    Refused,
}

/// What decoding one picture said; made by the worker binary, never by the server process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ImageVerdict {
    /// Decoded.
    Ok {
        /// Pixels, after EXIF rotation.
        width: u32,
        /// Pixels, after EXIF rotation.
        height: u32,
        /// `png`, `jpeg`, `webp`.
        format: String,
    },
    /// Not usable.
    Bad {
        /// Stable code.
        code: String,
        /// One sentence.
        detail: String,
    },
}
