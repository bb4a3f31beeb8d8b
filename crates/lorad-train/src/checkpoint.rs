//! Checkpoints: everything that an exact resume needs, written so that a reader never sees half of one.
//!
//! ```text
//! checkpoints/00000100/adapter.safetensors    f32 masters
//! checkpoints/00000100/optimizer.safetensors  f32 moments by name
//! checkpoints/00000100/state.json             crate::state::TrainState
//! checkpoints/00000100/manifest.json          Manifest: length and SHA-256 of each file above
//! ```
//!
//! Written at optimizer-step boundaries only, so there is no half accumulation window to save; randomness is
//! counter-based ([`crate::rng`]), so there is no generator to save. Called by [`crate::run`] and, to pick the one to
//! resume from, by the server. Knows no family.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
};

use candle_core::Tensor;
use lorad_faults::{Point, around, write_all};
use lorad_proto::problem::Problem;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{Result, TrainError, state::TrainState};

const ADAPTER: &str = "adapter.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.json";
const MANIFEST: &str = "manifest.json";
/// Prefix of directories that are not complete.
const TMP_PREFIX: &str = ".tmp-";

/// What a checkpoint directory holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of this layout.
    pub version: u32,
    /// Optimizer steps completed.
    pub step: u64,
    /// Length and SHA-256 of every other file.
    pub files: BTreeMap<String, FileEntry>,
}

/// One file of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Length.
    pub bytes: u64,
    /// SHA-256, hex.
    pub sha256: String,
}

/// A checkpoint that was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// Name of its directory.
    pub dir: String,
    /// Size of all its files.
    pub bytes: u64,
    /// SHA-256 of its manifest, hex.
    pub sha256: String,
}

/// Everything that training continues from. Tensors are copies, not views of the live ones.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Counters and fingerprints.
    pub state: TrainState,
    /// Adapter tensors by full name.
    pub adapter: BTreeMap<String, Tensor>,
    /// Optimizer moments by name.
    pub optimizer: BTreeMap<String, Tensor>,
}

/// Name of the directory that holds a step.
pub fn dir_name(step: u64) -> String {
    format!("{step:08}")
}

/// Writes a snapshot under `root`, durably and at once: temporary directory, fsync of each file, manifest, rename, fsync
/// of the parent.
///
/// # Errors
/// What could not be written; then nothing is left under `root`. (A process that dies leaves a `.tmp-` directory, which
/// [`sweep`] removes.)
pub fn write(root: &Path, snapshot: &Snapshot) -> Result<Written> {
    fs::create_dir_all(root).map_err(TrainError::io("create", root))?;
    let dir = dir_name(snapshot.state.step);
    let tmp = root.join(format!("{TMP_PREFIX}{dir}"));
    if tmp.exists() {
        fs::remove_dir_all(&tmp).map_err(TrainError::io("remove", &tmp))?;
    }
    fs::create_dir(&tmp).map_err(TrainError::io("create", &tmp))?;
    let written = write_in(root, &tmp, dir, snapshot);
    if written.is_err() && tmp.exists() {
        // The disk may be full: half a checkpoint must not keep what it took.
        fs::remove_dir_all(&tmp).map_err(TrainError::io("remove", &tmp))?;
    }
    written
}

fn write_in(root: &Path, tmp: &Path, dir: String, snapshot: &Snapshot) -> Result<Written> {
    let mut files = BTreeMap::new();
    let state =
        serde_json::to_vec_pretty(&snapshot.state).map_err(|e| TrainError::io("write", tmp.join(STATE))(e.into()))?;
    for (point, name, bytes) in [
        (Point::WriteAdapter, ADAPTER, serialize_tensors(&snapshot.adapter)?),
        (
            Point::WriteOptimizer,
            OPTIMIZER,
            serialize_tensors(&snapshot.optimizer)?,
        ),
        (Point::WriteState, STATE, state),
    ] {
        files.insert(name.to_owned(), write_synced(point, &tmp.join(name), &bytes)?);
    }
    let manifest = Manifest {
        version: 1,
        step: snapshot.state.step,
        files,
    };
    let manifest_bytes =
        serde_json::to_vec_pretty(&manifest).map_err(|e| TrainError::io("write", tmp.join(MANIFEST))(e.into()))?;
    let entry = write_synced(Point::WriteManifest, &tmp.join(MANIFEST), &manifest_bytes)?;
    sync_dir(Point::SyncCheckpoint, tmp)?;

    let target = root.join(&dir);
    if target.exists() {
        // Asked twice at the same step: the content is the same, and a rename cannot replace a full directory.
        fs::remove_dir_all(&target).map_err(TrainError::io("remove", &target))?;
    }
    around(Point::RenameCheckpoint, || fs::rename(tmp, &target)).map_err(TrainError::io("rename", &target))?;
    sync_dir(Point::SyncCheckpoints, root)?;
    Ok(Written {
        dir,
        bytes: entry.bytes + manifest.files.values().map(|f| f.bytes).sum::<u64>(),
        sha256: entry.sha256,
    })
}

/// Checks that every file of a checkpoint is what its manifest says.
///
/// # Errors
/// `checkpoint.damaged`, naming the file.
pub fn verify(dir: &Path) -> Result<Manifest, Problem> {
    let damaged = |file: &str, why: String| {
        Problem::new(
            "checkpoint.damaged",
            "The checkpoint is damaged",
            format!("{}: {why}", dir.join(file).display()),
        )
        .with_hint("Continue from an older checkpoint.")
    };
    let bytes = fs::read(dir.join(MANIFEST)).map_err(|e| damaged(MANIFEST, e.to_string()))?;
    let manifest: Manifest = serde_json::from_slice(&bytes).map_err(|e| damaged(MANIFEST, e.to_string()))?;
    if manifest.version != 1 {
        return Err(damaged(MANIFEST, format!("unknown version {}", manifest.version)));
    }
    for name in [ADAPTER, OPTIMIZER, STATE] {
        if !manifest.files.contains_key(name) {
            return Err(damaged(name, "not in the manifest".to_owned()));
        }
    }
    for (name, entry) in &manifest.files {
        let found = hash_file(&dir.join(name)).map_err(|e| damaged(name, e.to_string()))?;
        if found != *entry {
            return Err(damaged(
                name,
                format!(
                    "{} bytes, sha256 {}; the manifest says {} bytes, sha256 {}",
                    found.bytes, found.sha256, entry.bytes, entry.sha256
                ),
            ));
        }
    }
    Ok(manifest)
}

/// Verifies and reads a checkpoint, onto the CPU.
///
/// # Errors
/// `checkpoint.damaged`, naming the file.
pub fn read(dir: &Path) -> Result<Snapshot> {
    verify(dir)?;
    let state_path = dir.join(STATE);
    let bytes = fs::read(&state_path).map_err(TrainError::io("read", &state_path))?;
    let state = serde_json::from_slice(&bytes).map_err(|e| {
        Problem::new(
            "checkpoint.damaged",
            "The checkpoint is damaged",
            format!("{}: {e}", state_path.display()),
        )
    })?;
    let load = |name: &str| -> Result<BTreeMap<String, Tensor>> {
        Ok(
            candle_core::safetensors::load(dir.join(name), &candle_core::Device::Cpu)?
                .into_iter()
                .collect(),
        )
    };
    Ok(Snapshot {
        state,
        adapter: load(ADAPTER)?,
        optimizer: load(OPTIMIZER)?,
    })
}

/// The newest checkpoint under `root` whose manifest verifies.
pub fn newest_verified(root: &Path) -> Option<PathBuf> {
    let mut steps = list(root);
    steps.sort_unstable();
    steps
        .into_iter()
        .rev()
        .map(|step| root.join(dir_name(step)))
        .find(|dir| verify(dir).is_ok())
}

/// Steps of the complete checkpoints under `root`, not verified, in no order.
pub fn list(root: &Path) -> Vec<u64> {
    let Ok(entries) = fs::read_dir(root) else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect()
}

/// Removes what an interrupted write left behind.
///
/// # Errors
/// What could not be removed.
pub fn sweep(root: &Path) -> Result<()> {
    let Ok(entries) = fs::read_dir(root) else {
        return Ok(());
    };
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().starts_with(TMP_PREFIX) {
            fs::remove_dir_all(entry.path()).map_err(TrainError::io("remove", entry.path()))?;
        }
    }
    Ok(())
}

/// Which checkpoints to delete so that the `keep` newest stay. Policy only; touches no file.
pub fn expired(steps: &[u64], keep: usize) -> Vec<u64> {
    let mut sorted = steps.to_vec();
    sorted.sort_unstable();
    sorted.dedup();
    sorted.truncate(sorted.len().saturating_sub(keep.max(1)));
    sorted
}

/// Deletes the checkpoints beyond the `keep` newest. Call after a newer one has been written.
///
/// # Errors
/// What could not be removed.
pub fn prune(root: &Path, keep: usize) -> Result<()> {
    for old in expired(&list(root), keep) {
        let dir = root.join(dir_name(old));
        around(Point::PruneCheckpoints, || fs::remove_dir_all(&dir)).map_err(TrainError::io("remove", &dir))?;
    }
    Ok(())
}

/// Length and SHA-256 of a file, read in pieces.
///
/// # Errors
/// If it cannot be read.
pub fn hash_file(path: &Path) -> std::io::Result<FileEntry> {
    let mut file = File::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0_u8; 1 << 20];
    let mut bytes = 0;
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            break;
        }
        hasher.update(&buffer[..n]);
        bytes += n as u64;
    }
    Ok(FileEntry {
        bytes,
        sha256: hex::encode(hasher.finalize()),
    })
}

/// Writes a new file and waits until it is on the disk.
fn write_synced(point: Point, path: &Path, bytes: &[u8]) -> Result<FileEntry> {
    let mut file = File::create(path).map_err(TrainError::io("create", path))?;
    write_all(point, &mut file, bytes).map_err(TrainError::io("write", path))?;
    file.sync_all().map_err(TrainError::io("sync", path))?;
    Ok(FileEntry {
        bytes: bytes.len() as u64,
        sha256: hex::encode(Sha256::digest(bytes)),
    })
}

fn sync_dir(point: Point, path: &Path) -> Result<()> {
    around(point, || File::open(path)?.sync_all()).map_err(TrainError::io("sync", path))
}

/// Safetensors bytes of named tensors, in sorted order.
fn serialize_tensors(tensors: &BTreeMap<String, Tensor>) -> Result<Vec<u8>> {
    safetensors::serialize(tensors.iter(), None).map_err(|e| {
        Problem::new(
            "checkpoint.failed",
            "The checkpoint could not be written",
            e.to_string(),
        )
        .into()
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use candle_core::{DType, Device};
    use proptest::prelude::*;

    use super::*;

    fn snapshot(step: u64) -> Snapshot {
        let a = Tensor::new(&[[1.0_f32, f32::MIN_POSITIVE], [-0.0, 3.5]], &Device::Cpu).unwrap();
        Snapshot {
            state: TrainState {
                step,
                ..TrainState::default()
            },
            adapter: BTreeMap::from([("x.lora_A.weight".to_owned(), a.clone())]),
            optimizer: BTreeMap::from([("x.lora_A.weight.m".to_owned(), a)]),
        }
    }

    #[test]
    fn what_was_written_is_read_back_bit_for_bit() {
        let root = tempfile::tempdir().unwrap();
        let written = write(root.path(), &snapshot(12)).unwrap();
        assert_eq!(written.dir, "00000012");
        let manifest_hash = hash_file(&root.path().join("00000012/manifest.json")).unwrap().sha256;
        assert_eq!(written.sha256, manifest_hash);
        let back = read(&root.path().join(&written.dir)).unwrap();
        assert_eq!(back.state, snapshot(12).state);
        let a = &back.adapter["x.lora_A.weight"];
        assert_eq!(a.dtype(), DType::F32);
        let bits: Vec<u32> = a
            .flatten_all()
            .unwrap()
            .to_vec1::<f32>()
            .unwrap()
            .iter()
            .map(|x| x.to_bits())
            .collect();
        assert_eq!(bits, [1.0_f32, f32::MIN_POSITIVE, -0.0, 3.5].map(f32::to_bits));
    }

    #[test]
    fn a_flipped_bit_in_any_file_is_noticed_and_the_next_older_checkpoint_is_chosen() {
        for victim in [ADAPTER, OPTIMIZER, STATE, MANIFEST] {
            let root = tempfile::tempdir().unwrap();
            write(root.path(), &snapshot(1)).unwrap();
            write(root.path(), &snapshot(2)).unwrap();
            assert_eq!(newest_verified(root.path()), Some(root.path().join("00000002")));
            let path = root.path().join("00000002").join(victim);
            let mut bytes = fs::read(&path).unwrap();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 0x10;
            fs::write(&path, bytes).unwrap();
            assert_eq!(
                verify(&root.path().join("00000002")).unwrap_err().code,
                "checkpoint.damaged",
                "{victim}"
            );
            assert_eq!(
                newest_verified(root.path()),
                Some(root.path().join("00000001")),
                "{victim}"
            );
        }
    }

    #[test]
    fn a_half_written_checkpoint_is_invisible_and_swept() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join(".tmp-00000009")).unwrap();
        fs::write(root.path().join(".tmp-00000009/adapter.safetensors"), b"half").unwrap();
        assert_eq!(newest_verified(root.path()), None);
        sweep(root.path()).unwrap();
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[test]
    fn pruning_keeps_the_newest() {
        let root = tempfile::tempdir().unwrap();
        for step in 1..=4 {
            write(root.path(), &snapshot(step)).unwrap();
        }
        prune(root.path(), 2).unwrap();
        let mut left = list(root.path());
        left.sort_unstable();
        assert_eq!(left, [3, 4]);
    }

    proptest! {
        #[test]
        fn the_keep_policy_never_deletes_the_newest_and_keeps_exactly_the_newest_ones(
            mut steps in proptest::collection::vec(0_u64..1000, 0..20), keep in 0_usize..6,
        ) {
            let gone = expired(&steps, keep);
            steps.sort_unstable();
            steps.dedup();
            let kept: Vec<u64> = steps.iter().copied().filter(|s| !gone.contains(s)).collect();
            prop_assert_eq!(kept.len(), steps.len().min(keep.max(1)));
            prop_assert!(steps.ends_with(&kept));
        }
    }
}
