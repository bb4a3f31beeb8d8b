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
    /// How often an epoch shows it, at least 1.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub repeats: u32,
    /// Whether it is a regularisation image, for prior preservation.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_reg: bool,
    /// Where its loss counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mask: Option<Mask>,
}

impl Default for Item {
    fn default() -> Self {
        Self {
            n: 0,
            file: String::new(),
            source: String::new(),
            caption: String::new(),
            width: 0,
            height: 0,
            bytes: 0,
            sha256: String::new(),
            repeats: 1,
            is_reg: false,
            mask: None,
        }
    }
}

fn one() -> u32 {
    1
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature that serde calls")]
fn is_one(n: &u32) -> bool {
    *n == 1
}

/// A picture that says where another one's loss counts: white everywhere it does, black where it does not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mask {
    /// Generated name under `files/`.
    pub file: String,
    /// SHA-256 of the file, hex.
    pub sha256: String,
}

/// What one epoch shows, as indices into `items`: each item as often as its `repeats` say, and regularisation images in
/// turn until there are as many of them as of the others (once each, then from the start; if there are more, the first).
///
/// # Source
/// kohya sd-scripts 48d368f `library/train_util.py`, `DreamBoothDataset.__init__`.
pub fn epoch_samples(items: &[Item]) -> Vec<usize> {
    let (reg, plain): (Vec<usize>, Vec<usize>) = (0..items.len()).partition(|&i| items[i].is_reg);
    let times = |i: usize| items[i].repeats.max(1) as usize;
    let mut samples: Vec<usize> = plain.iter().flat_map(|&i| std::iter::repeat_n(i, times(i))).collect();
    let (mut missing, mut first_round) = (samples.len(), true);
    while missing > 0 && !reg.is_empty() {
        for &i in &reg {
            let n = if first_round { times(i) } else { 1 };
            samples.extend(std::iter::repeat_n(i, n));
            missing = missing.saturating_sub(n);
            if missing == 0 {
                break;
            }
        }
        first_round = false;
    }
    samples.sort_unstable();
    samples
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
    /// Pictures that one epoch shows, repeats and regularisation images counted; 0 in reports made before it was counted.
    #[serde(default)]
    pub n_samples: u32,
    /// Regularisation images among the items.
    #[serde(default)]
    pub n_reg: u32,
}

impl Report {
    /// Pictures that one epoch shows.
    pub fn samples(&self) -> u32 {
        if self.n_samples == 0 {
            self.n_items
        } else {
            self.n_samples
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn item(repeats: u32, is_reg: bool) -> Item {
        Item {
            repeats,
            is_reg,
            ..Item::default()
        }
    }

    #[test]
    fn an_epoch_shows_each_picture_as_often_as_it_is_repeated_and_as_many_for_regularisation() {
        assert_eq!(epoch_samples(&[item(1, false), item(1, false)]), [0, 1]);
        assert_eq!(epoch_samples(&[item(3, false), item(1, false)]), [0, 0, 0, 1]);
        // Five pictures in an epoch, two regularisation images: three and two times.
        assert_eq!(
            epoch_samples(&[item(5, false), item(1, true), item(1, true)]),
            [0, 0, 0, 0, 0, 1, 1, 1, 2, 2]
        );
        // More of them than needed: the first.
        assert_eq!(epoch_samples(&[item(1, false), item(1, true), item(1, true)]), [0, 1]);
        assert!(epoch_samples(&[item(1, true)]).is_empty());
    }

    #[test]
    fn a_plain_item_is_written_as_before() -> Result<(), serde_json::Error> {
        let text = serde_json::to_string(&item(1, false))?;
        assert!(!text.contains("repeats") && !text.contains("is_reg") && !text.contains("mask"));
        assert_eq!(serde_json::from_str::<Item>(&text)?, item(1, false));
        Ok(())
    }
}
