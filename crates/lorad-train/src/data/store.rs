//! A cache of tensors on disk, shared by jobs: what encoders said about a picture or a text, under a key made of
//! everything that it depends on. A changed picture, cut, setting or encoder has another key, so nothing is ever stale.
//!
//! One file an entry, written beside its place and renamed, and read back only if its checksum fits: an entry that was
//! cut off or has rotted is computed again. The directory is kept under a size; the entries that were not used for the
//! longest go first. Any number of processes may use it at once, and it may be deleted at any time.
//!
//! Knows tensors and files; what is cached is the families' to say.

use std::{
    collections::HashMap,
    fs,
    io::Write,
    path::{Path, PathBuf},
    time::SystemTime,
};

use candle_core::{DType, Device, Tensor};
use sha2::{Digest, Sha256};

use crate::{Result, TrainError};

/// Part of every key: to be raised when what is computed changes without its inputs.
const VERSION: u32 = 1;
/// Before the payload: its SHA-256.
const CHECKSUM_BYTES: usize = 32;
const EXTENSION: &str = "tensors";

/// What an entry is the answer to. Every part goes in with its length, so no two lists of parts make one key.
#[derive(Debug, Clone)]
pub struct Key(Sha256);

impl Key {
    /// A key for things of this kind (`latents`, `text`).
    pub fn new(kind: &str) -> Self {
        Self(Sha256::new()).with(VERSION.to_le_bytes()).with(kind)
    }

    /// The key with one more thing that the answer depends on.
    #[must_use]
    pub fn with(mut self, part: impl AsRef<[u8]>) -> Self {
        let part = part.as_ref();
        self.0.update((part.len() as u64).to_le_bytes());
        self.0.update(part);
        self
    }

    /// 64 hex digits.
    pub fn hex(&self) -> String {
        hex::encode(self.0.clone().finalize())
    }
}

/// The cache's directory. Without one, everything is computed.
#[derive(Debug)]
pub struct TensorCache {
    dir: Option<PathBuf>,
    max_bytes: u64,
    /// Where tensors go that are found.
    device: Device,
    hits: u64,
    misses: u64,
}

impl TensorCache {
    /// A cache in `dir` (made if need be) of at most `max_bytes`; 0 or no directory: none.
    ///
    /// # Errors
    /// If the directory cannot be made.
    pub fn open(dir: Option<&Path>, max_bytes: u64, device: &Device) -> Result<Self> {
        let dir = dir.filter(|_| max_bytes > 0).map(Path::to_owned);
        if let Some(dir) = &dir {
            fs::create_dir_all(dir).map_err(TrainError::io("create", dir))?;
        }
        Ok(Self {
            dir,
            max_bytes,
            device: device.clone(),
            hits: 0,
            misses: 0,
        })
    }

    /// Where tensors go that are found.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Entries found and entries computed.
    pub fn counts(&self) -> (u64, u64) {
        (self.hits, self.misses)
    }

    /// The tensors under `key`, f32, as many as `compute` gives; computed and stored if they are not there whole.
    ///
    /// # Errors
    /// What `compute` fails with.
    pub fn get(&mut self, key: &Key, compute: impl FnOnce() -> Result<Vec<Tensor>>) -> Result<Vec<Tensor>> {
        if let Some(tensors) = self.find(key) {
            return Ok(tensors);
        }
        let tensors = compute()?;
        self.store(key, &tensors);
        Ok(tensors)
    }

    /// The tensors under `key`, if they are there whole.
    pub fn find(&mut self, key: &Key) -> Option<Vec<Tensor>> {
        let path = self.path(key)?;
        let Some(tensors) = read(&path, &self.device) else {
            self.misses += 1;
            return None;
        };
        self.hits += 1;
        // When it was last used; a failure only makes it look older.
        let used = fs::File::options()
            .append(true)
            .open(&path)
            .and_then(|f| f.set_modified(SystemTime::now()));
        if let Err(error) = used {
            tracing::debug!(%error, "cannot mark a cache entry as used");
        }
        Some(tensors)
    }

    /// Stores what was computed. An entry that cannot be written (the disk is full) costs no job: it is computed again
    /// next time.
    pub fn store(&self, key: &Key, tensors: &[Tensor]) {
        let Some(path) = self.path(key) else { return };
        if let Err(error) = write(&path, tensors) {
            tracing::warn!(%error, "cannot write to the cache at {}", path.display());
        }
    }

    /// Where the entry lies: 256 folders, so that none grows too large to list.
    fn path(&self, key: &Key) -> Option<PathBuf> {
        let name = key.hex();
        Some(self.dir.as_ref()?.join(&name[..2]).join(format!("{name}.{EXTENSION}")))
    }

    /// Deletes the entries that were not used for the longest until the rest fits. What another process deletes meanwhile
    /// is no error.
    pub fn evict(&self) {
        let Some(dir) = &self.dir else { return };
        let mut entries: Vec<(SystemTime, u64, PathBuf)> = walkdir::WalkDir::new(dir)
            .min_depth(2)
            .max_depth(2)
            .into_iter()
            .flatten()
            .filter_map(|entry| {
                let metadata = entry.metadata().ok().filter(std::fs::Metadata::is_file)?;
                Some((metadata.modified().ok()?, metadata.len(), entry.into_path()))
            })
            .collect();
        let mut total: u64 = entries.iter().map(|(_, bytes, _)| bytes).sum();
        entries.sort();
        for (_, bytes, path) in entries {
            if total <= self.max_bytes {
                break;
            }
            if fs::remove_file(&path).is_ok() {
                total -= bytes;
            }
        }
    }
}

/// The tensors of an entry, if it is whole.
fn read(path: &Path, device: &Device) -> Option<Vec<Tensor>> {
    let bytes = fs::read(path).ok()?;
    let (checksum, payload) = bytes.split_at_checked(CHECKSUM_BYTES)?;
    if Sha256::digest(payload)[..] != *checksum {
        tracing::warn!("a cache entry is damaged and is made again: {}", path.display());
        return None;
    }
    let mut named = candle_core::safetensors::load_buffer(payload, device).ok()?;
    (0..named.len()).map(|i| named.remove(&i.to_string())).collect()
}

/// Writes an entry: never half of one under its name.
fn write(path: &Path, tensors: &[Tensor]) -> Result<()> {
    let mut named = HashMap::new();
    for (i, tensor) in tensors.iter().enumerate() {
        named.insert(
            i.to_string(),
            tensor.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.contiguous()?,
        );
    }
    let payload = safetensors::serialize(&named, None).map_err(candle_core::Error::from)?;
    let folder = path.parent().unwrap_or(path);
    let io = |act| TrainError::io(act, path);
    fs::create_dir_all(folder).map_err(io("create the folder of"))?;
    let mut file = tempfile::NamedTempFile::new_in(folder).map_err(io("write"))?;
    file.write_all(&Sha256::digest(&payload)).map_err(io("write"))?;
    file.write_all(&payload).map_err(io("write"))?;
    file.persist(path).map_err(|e| io("write")(e.error))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    fn tensor(values: &[f32]) -> Tensor {
        Tensor::new(values, &Device::Cpu).unwrap()
    }

    fn values(tensors: &[Tensor]) -> Vec<Vec<f32>> {
        tensors.iter().map(|t| t.to_vec1().unwrap()).collect()
    }

    fn get(cache: &mut TensorCache, key: &Key, made: &[f32]) -> Vec<Vec<f32>> {
        let found = cache.get(key, || Ok(vec![tensor(made), tensor(&[7.0])])).unwrap();
        values(&found)
    }

    proptest! {
        #[test]
        fn keys_are_equal_only_if_every_part_is(a: Vec<Vec<u8>>, b: Vec<Vec<u8>>) {
            let key = |parts: &[Vec<u8>]| parts.iter().fold(Key::new("test"), Key::with).hex();
            prop_assert_eq!(key(&a) == key(&b), a == b);
        }
    }

    #[test]
    fn an_entry_is_computed_once_and_found_by_the_next_process() {
        let dir = tempfile::tempdir().unwrap();
        let key = Key::new("test").with("a");
        let mut first = TensorCache::open(Some(dir.path()), 1 << 20, &Device::Cpu).unwrap();
        assert_eq!(get(&mut first, &key, &[1.0, 2.0]), [vec![1.0, 2.0], vec![7.0]]);
        let mut second = TensorCache::open(Some(dir.path()), 1 << 20, &Device::Cpu).unwrap();
        assert_eq!(get(&mut second, &key, &[9.0]), [vec![1.0, 2.0], vec![7.0]]);
        assert_eq!((first.counts(), second.counts()), ((0, 1), (1, 0)));
        assert_eq!(get(&mut second, &Key::new("test").with("b"), &[9.0])[0], [9.0]);
    }

    #[test]
    fn a_damaged_entry_is_computed_again() {
        let dir = tempfile::tempdir().unwrap();
        let mut cache = TensorCache::open(Some(dir.path()), 1 << 20, &Device::Cpu).unwrap();
        let key = Key::new("test");
        get(&mut cache, &key, &[1.0]);
        let path = cache.path(&key).unwrap();
        let whole = fs::read(&path).unwrap();
        let mut flipped = whole.clone();
        flipped[whole.len() - 1] ^= 1;
        for spoilt in [&whole[..whole.len() / 2], &whole[..10], &[], &flipped] {
            fs::write(&path, spoilt).unwrap();
            assert_eq!(get(&mut cache, &key, &[1.0])[0], [1.0]);
            assert_eq!(fs::read(&path).unwrap(), whole, "it is whole again");
        }
        assert_eq!(cache.counts(), (0, 5));
    }

    #[test]
    fn what_was_not_used_for_the_longest_goes_first() {
        let dir = tempfile::tempdir().unwrap();
        let mut cache = TensorCache::open(Some(dir.path()), 1 << 20, &Device::Cpu).unwrap();
        let keys: Vec<Key> = (0..4_u8).map(|n| Key::new("test").with([n])).collect();
        let at = |n: u64| SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(n);
        let mut bytes = 0;
        for (n, key) in (0..).zip(&keys) {
            get(&mut cache, key, &[0.0]);
            let path = cache.path(key).unwrap();
            bytes = fs::metadata(&path).unwrap().len();
            fs::File::options()
                .append(true)
                .open(path)
                .unwrap()
                .set_modified(at(n))
                .unwrap();
        }
        get(&mut cache, &keys[0], &[0.0]); // used now
        cache.max_bytes = 2 * bytes;
        cache.evict();
        let left: Vec<bool> = keys.iter().map(|key| cache.path(key).unwrap().exists()).collect();
        assert_eq!(left, [true, false, false, true]);
    }

    #[test]
    fn without_a_directory_or_room_everything_is_computed() {
        let dir = tempfile::tempdir().unwrap();
        for mut cache in [
            TensorCache::open(None, 1, &Device::Cpu).unwrap(),
            TensorCache::open(Some(dir.path()), 0, &Device::Cpu).unwrap(),
        ] {
            let key = Key::new("test");
            assert_eq!(get(&mut cache, &key, &[1.0])[0], [1.0]);
            assert_eq!(get(&mut cache, &key, &[2.0])[0], [2.0]);
            cache.evict();
        }
        assert!(fs::read_dir(dir.path()).unwrap().next().is_none());
    }
}
