//! Whether a checkpoint directory is whole: every file that its `manifest.json` names has the length and SHA-256 written
//! there. What the files mean is the trainer's affair.
//!
//! Called by `scheduler` (which checkpoint to resume from) and `agent` (which step that is).

use std::{collections::BTreeMap, io::Read, path::Path};

use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::domain::artifact::is_plain_file_name;

/// The part of a manifest that is needed to check it.
#[derive(Debug, Deserialize)]
struct Manifest {
    step: u64,
    files: BTreeMap<String, Entry>,
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
struct Entry {
    bytes: u64,
    sha256: String,
}

/// Optimizer steps in a checkpoint, if it is whole. With `manifest_sha256`, only if its manifest is the announced one.
pub(crate) fn verified_step(dir: &Path, manifest_sha256: Option<&str>) -> Option<u64> {
    let bytes = std::fs::read(dir.join("manifest.json")).ok()?;
    if manifest_sha256.is_some_and(|announced| hex::encode(Sha256::digest(&bytes)) != announced) {
        return None;
    }
    let manifest: Manifest = serde_json::from_slice(&bytes).ok()?;
    let whole = manifest
        .files
        .iter()
        .all(|(name, entry)| is_plain_file_name(name) && hashed(&dir.join(name)).is_ok_and(|found| found == *entry));
    whole.then_some(manifest.step)
}

fn hashed(path: &Path) -> std::io::Result<Entry> {
    let mut file = std::fs::File::open(path)?;
    let (mut hash, mut bytes, mut buffer) = (Sha256::new(), 0, vec![0; 1 << 20]);
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            break;
        }
        hash.update(&buffer[..n]);
        bytes += n as u64;
    }
    Ok(Entry {
        bytes,
        sha256: hex::encode(hash.finalize()),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn one_flipped_bit_one_missing_file_or_another_manifest_is_enough() {
        let dir = tempfile::tempdir().unwrap();
        let (file, manifest) = (dir.path().join("adapter.safetensors"), dir.path().join("manifest.json"));
        std::fs::write(&file, b"weights").unwrap();
        let sha256 = hex::encode(Sha256::digest(b"weights"));
        let text =
            format!(r#"{{"version":1,"step":7,"files":{{"adapter.safetensors":{{"bytes":7,"sha256":"{sha256}"}}}}}}"#);
        std::fs::write(&manifest, &text).unwrap();
        let announced = hex::encode(Sha256::digest(text.as_bytes()));
        assert_eq!(verified_step(dir.path(), Some(&announced)), Some(7));
        assert_eq!(verified_step(dir.path(), None), Some(7));
        assert_eq!(verified_step(dir.path(), Some(&sha256)), None);
        std::fs::write(&file, b"weighty").unwrap();
        assert_eq!(verified_step(dir.path(), None), None);
        std::fs::remove_file(&file).unwrap();
        assert_eq!(verified_step(dir.path(), None), None);
        std::fs::write(&manifest, text.replace("adapter.safetensors", "../adapter.safetensors")).unwrap();
        assert_eq!(verified_step(dir.path(), None), None);
    }
}
