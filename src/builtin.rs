//! The base model that comes with the binary: unpacked into the data directory, verified, registered.
//!
//! Called by `serve` at the start, and by the command line where a job runs without a server.

use std::{
    io::Write,
    path::{Path, PathBuf},
};

use lorad_faults::{Point, around};
use lorad_proto::{catalog::Catalog, problem::Problem};
use rust_embed::RustEmbed;
use sha2::{Digest, Sha256};

use crate::{
    domain::{Model, ModelId, ModelKind, now_ms},
    store::{Store, StoreError},
};

/// Slug of the bundled base model.
pub const BUNDLED_MODEL: &str = "demo-icons";

#[derive(RustEmbed)]
#[folder = "$CARGO_MANIFEST_DIR/assets/demo-icons"]
struct DemoIcons;

/// Why the bundled model is not ready.
#[derive(Debug, thiserror::Error)]
pub enum BuiltinError {
    /// The disk failed.
    #[error("cannot unpack the bundled model to {path}")]
    Unpack {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The trainer does not take it.
    #[error("the trainer refuses the bundled model")]
    Inspect(#[source] Box<Problem>),
    /// The database failed.
    #[error("cannot register the bundled model")]
    Store(#[from] StoreError),
}

/// Unpacks the bundled base model under `models`, unless it lies there whole. Returns its folder.
///
/// Blocking. A folder that differs from what is embedded (an interrupted start, bit rot, another version) is replaced.
///
/// # Errors
/// If the disk fails.
pub fn unpack(models: &Path) -> Result<PathBuf, BuiltinError> {
    let dest = models.join(BUNDLED_MODEL);
    if is_whole(&dest) {
        return Ok(dest);
    }
    let at = |path: &Path| {
        let path = path.to_owned();
        move |source| BuiltinError::Unpack { path, source }
    };
    std::fs::create_dir_all(models).map_err(at(models))?;
    let fresh = tempfile::Builder::new()
        .prefix(".unpack-")
        .tempdir_in(models)
        .map_err(at(models))?;
    for name in DemoIcons::iter() {
        let Some(embedded) = DemoIcons::get(&name) else {
            continue;
        };
        let path = fresh.path().join(name.as_ref());
        let write = || -> std::io::Result<()> {
            if let Some(parent) = path.parent() {
                std::fs::create_dir_all(parent)?;
            }
            let mut file = std::fs::File::create(&path)?;
            file.write_all(&embedded.data)?;
            file.sync_all()
        };
        write().map_err(at(&path))?;
    }
    if dest.exists() {
        std::fs::remove_dir_all(&dest).map_err(at(&dest))?;
    }
    around(Point::UnpackModel, || std::fs::rename(fresh.keep(), &dest)).map_err(at(&dest))?;
    Ok(dest)
}

fn is_whole(dir: &Path) -> bool {
    DemoIcons::iter().all(|name| {
        let embedded = DemoIcons::get(&name).map(|file| file.metadata.sha256_hash());
        let on_disk = std::fs::read(dir.join(name.as_ref())).map(|bytes| Sha256::digest(&bytes));
        matches!((embedded, on_disk), (Some(embedded), Ok(on_disk)) if embedded[..] == on_disk[..])
    })
}

/// Registers the unpacked model.
///
/// # Errors
/// If the trainer refuses it (a build without trainer refuses every model) or the database fails.
pub async fn register(store: &Store, catalog: &dyn Catalog, path: PathBuf) -> Result<Model, BuiltinError> {
    let info = catalog
        .inspect_base(&path)
        .map_err(|problem| BuiltinError::Inspect(Box::new(problem)))?;
    let id: ModelId = BUNDLED_MODEL.parse().map_err(|_| StoreError::NotFound {
        what: "model",
        id: BUNDLED_MODEL.to_owned(),
    })?;
    let model = Model {
        id,
        kind: ModelKind::Base,
        path,
        source: "bundled".to_owned(),
        licence: "see NOTICE beside the bundled assets".to_owned(),
        builtin: true,
        info,
        created_at_ms: now_ms(),
    };
    store.insert_model(&model).await?;
    Ok(model)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_bundled_model_is_unpacked_once_and_repaired_when_damaged() {
        let dir = tempfile::tempdir().unwrap();
        let path = unpack(dir.path()).unwrap();
        let index = path.join("model_index.json");
        let original = std::fs::read(&index).unwrap();
        let written = std::fs::metadata(&index).unwrap().modified().unwrap();
        unpack(dir.path()).unwrap();
        assert_eq!(
            std::fs::metadata(&index).unwrap().modified().unwrap(),
            written,
            "unpacked twice"
        );
        std::fs::write(&index, b"{}").unwrap();
        unpack(dir.path()).unwrap();
        assert_eq!(std::fs::read(&index).unwrap(), original);
        let names: Vec<_> = std::fs::read_dir(dir.path())
            .unwrap()
            .flatten()
            .map(|e| e.file_name())
            .collect();
        assert_eq!(names, [BUNDLED_MODEL], "something was left behind");
    }
}
