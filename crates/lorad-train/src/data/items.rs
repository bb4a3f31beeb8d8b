//! Reads `items.jsonl` of an ingested dataset.

use std::{fs, path::Path};

use lorad_proto::{
    dataset::{Item, epoch_samples},
    problem::Problem,
};
use sha2::{Digest, Sha256};

use crate::{Result, TrainError};

/// Reads the items of a dataset folder, in order of `n`.
///
/// # Errors
/// `dataset.unreadable` (naming the line), `dataset.empty`, or `dataset.file_missing`.
pub fn read_items(dataset: &Path) -> Result<Vec<Item>> {
    let path = dataset.join("items.jsonl");
    let text = fs::read_to_string(&path).map_err(TrainError::io("read", &path))?;
    let mut items = Vec::new();
    for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let item: Item = serde_json::from_str(line).map_err(|e| {
            Problem::new(
                "dataset.unreadable",
                "The dataset cannot be read",
                format!("{}, line {}: {e}", path.display(), i + 1),
            )
            .with_hint("Upload the dataset again.")
        })?;
        let there = |file: &str| !file.contains(['/', '\\']) && dataset.join("files").join(file).is_file();
        if !there(&item.file) || item.mask.as_ref().is_some_and(|mask| !there(&mask.file)) {
            return Err(Problem::new(
                "dataset.file_missing",
                "A picture of the dataset is missing",
                format!(
                    "files/{} (uploaded as `{}`) is not in the dataset.",
                    item.file, item.source
                ),
            )
            .with_hint("Upload the dataset again.")
            .into());
        }
        items.push(item);
    }
    if epoch_samples(&items).is_empty() {
        return Err(Problem::new(
            "dataset.empty",
            "The dataset is empty",
            format!("{} lists nothing to train on.", path.display()),
        )
        .with_hint("Upload at least one picture with a caption.")
        .into());
    }
    items.sort_by_key(|item| item.n);
    Ok(items)
}

/// A hash of what training sees of the dataset: each file's bytes and caption, in order.
pub fn dataset_fingerprint(items: &[Item]) -> String {
    let mut hasher = Sha256::new();
    for item in items {
        hasher.update(item.sha256.as_bytes());
        hasher.update((item.caption.len() as u64).to_le_bytes());
        hasher.update(item.caption.as_bytes());
        // What a plain item has not is not hashed, so that checkpoints made before it existed still fit.
        if item.repeats != 1 || item.is_reg || item.mask.is_some() {
            let mask = item.mask.as_ref().map_or("", |mask| mask.sha256.as_str());
            hasher.update(format!("repeats {} reg {} mask {mask};", item.repeats, item.is_reg));
        }
    }
    hex::encode(hasher.finalize())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn item(n: u32, caption: &str) -> Item {
        Item {
            n,
            file: format!("{n:05}.png"),
            source: format!("pic-{n}.png"),
            caption: caption.to_owned(),
            width: 4,
            height: 4,
            bytes: 1,
            sha256: format!("{n:064}"),
            ..Item::default()
        }
    }

    fn dataset(items: &[Item]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("files")).unwrap();
        let mut text = String::new();
        for item in items {
            fs::write(dir.path().join("files").join(&item.file), b"x").unwrap();
            text += &serde_json::to_string(item).unwrap();
            text.push('\n');
        }
        fs::write(dir.path().join("items.jsonl"), text).unwrap();
        dir
    }

    fn code(result: Result<Vec<Item>>) -> String {
        result.unwrap_err().into_problem().code
    }

    #[test]
    fn items_come_in_order_of_n() {
        let dir = dataset(&[item(1, "b"), item(0, "a")]);
        let captions: Vec<String> = read_items(dir.path()).unwrap().into_iter().map(|i| i.caption).collect();
        assert_eq!(captions, ["a", "b"]);
    }

    #[test]
    fn an_empty_dataset_a_bad_line_and_a_missing_file_are_named() {
        assert_eq!(code(read_items(dataset(&[]).path())), "dataset.empty");
        let dir = dataset(&[item(0, "a")]);
        fs::remove_file(dir.path().join("files/00000.png")).unwrap();
        assert_eq!(code(read_items(dir.path())), "dataset.file_missing");
        fs::write(dir.path().join("items.jsonl"), "{\"n\":0}\n").unwrap();
        assert_eq!(code(read_items(dir.path())), "dataset.unreadable");
        let mut escape = item(0, "a");
        escape.file = "../items.jsonl".to_owned();
        fs::write(dir.path().join("items.jsonl"), serde_json::to_string(&escape).unwrap()).unwrap();
        assert_eq!(code(read_items(dir.path())), "dataset.file_missing");
    }

    #[test]
    fn the_fingerprint_sees_captions_and_bytes() {
        let base = dataset_fingerprint(&[item(0, "a"), item(1, "b")]);
        assert_ne!(base, dataset_fingerprint(&[item(0, "a"), item(1, "c")]));
        assert_ne!(base, dataset_fingerprint(&[item(1, "b"), item(0, "a")]));
        assert_ne!(
            dataset_fingerprint(&[item(0, "ab")]),
            dataset_fingerprint(&[item(0, "a")])
        );
    }
}
