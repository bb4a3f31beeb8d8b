//! Builds the dataset folder in staging and puts it in place by one rename.

use std::{
    collections::HashMap,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use lorad_faults::{Point, around, write_all};
use lorad_proto::dataset::{Item, Mask, Report, Verdict, epoch_samples};

use super::{Findings, IngestError, Ingested, pairing::Candidate};

/// A picture that was decoded.
#[derive(Debug)]
pub(super) struct Picture {
    pub(super) candidate: Candidate,
    pub(super) thumbnail: Option<PathBuf>,
    pub(super) width: u32,
    pub(super) height: u32,
}

/// Writes `items.jsonl`, `files/`, `thumbs/` and `report.json`, syncs everything, and renames it to `dest`.
pub(super) fn publish(
    pictures: Vec<Picture>,
    mut findings: Findings,
    work: &Path,
    dest: &Path,
) -> Result<Ingested, IngestError> {
    let build = work.join("dataset");
    let (files, thumbs) = (build.join("files"), build.join("thumbs"));
    for dir in [&build, &files, &thumbs] {
        fs::create_dir(dir).map_err(IngestError::io("create", dir))?;
    }
    let mut items = Vec::with_capacity(pictures.len());
    let mut first_with: HashMap<String, String> = HashMap::new();
    let mut n_duplicates = 0;
    for (n, picture) in (0u32..).zip(pictures) {
        let Candidate {
            raw,
            caption,
            extension,
            repeats,
            is_reg,
            mask,
        } = picture.candidate;
        let name = format!("{n:05}.{extension}");
        place(&raw.path, &files.join(&name))?;
        if let Some(thumbnail) = picture.thumbnail.filter(|t| t.exists()) {
            place(&thumbnail, &thumbs.join(format!("{n:05}.png")))?;
        }
        let mask = match mask {
            Some((raw, extension)) => {
                let file = format!("{n:05}.mask.{extension}");
                place(&raw.path, &files.join(&file))?;
                Some(Mask {
                    file,
                    sha256: raw.sha256,
                })
            }
            None => None,
        };
        if let Some(earlier) = first_with.get(&raw.sha256) {
            n_duplicates += 1;
            findings.others.remove(&raw.name);
            let detail = format!("the same bytes as {earlier}");
            findings.note(&raw.name, Verdict::Warning, "image.duplicate", detail);
        } else {
            first_with.insert(raw.sha256.clone(), raw.name.clone());
        }
        items.push(Item {
            n,
            file: name,
            source: raw.name,
            caption: caption.unwrap_or_default(),
            width: picture.width,
            height: picture.height,
            bytes: raw.bytes,
            sha256: raw.sha256,
            repeats,
            is_reg,
            mask,
        });
    }
    let sides = || items.iter().flat_map(|i| [i.width, i.height]);
    let longest = items.iter().map(|i| i.caption.chars().count()).max().unwrap_or(0);
    let report = Report {
        files: findings.verdicts(),
        n_items: items.len() as u32,
        n_duplicates,
        n_uncaptioned: 0, // a picture without a caption is refused
        max_caption_chars: u32::try_from(longest).unwrap_or(u32::MAX),
        min_side: sides().min().unwrap_or(0),
        max_side: sides().max().unwrap_or(0),
        n_samples: u32::try_from(epoch_samples(&items).len()).unwrap_or(u32::MAX),
        n_reg: items.iter().filter(|item| item.is_reg).count() as u32,
    };
    let lines = items.iter().map(serde_json::to_string).collect::<Result<Vec<_>, _>>();
    let lines = lines.map_err(|e| IngestError::io("encode", &build)(e.into()))?;
    write(&build.join("items.jsonl"), (lines.join("\n") + "\n").as_bytes())?;
    let json = serde_json::to_vec_pretty(&report).map_err(|e| IngestError::io("encode", &build)(e.into()))?;
    write(&build.join("report.json"), &json)?;
    for dir in [&files, &thumbs, &build] {
        around(Point::SyncDataset, || sync(dir)).map_err(IngestError::io("sync", dir))?;
    }
    if dest.exists() {
        let exists = io::Error::from(io::ErrorKind::AlreadyExists);
        return Err(IngestError::io("publish to", dest)(exists));
    }
    around(Point::RenameDataset, || fs::rename(&build, dest)).map_err(IngestError::io("rename to", dest))?;
    if let Some(parent) = dest.parent()
        && let Err(error) = around(Point::SyncDatasets, || sync(parent))
    {
        // Not known to be there after a power cut, so it must not be there at all.
        drop(fs::remove_dir_all(dest));
        return Err(IngestError::io("sync", parent)(error));
    }
    let bytes = items.iter().map(|i| i.bytes).sum();
    Ok(Ingested { report, items, bytes })
}

fn place(from: &Path, to: &Path) -> Result<(), IngestError> {
    sync(from).map_err(IngestError::io("sync", from))?;
    around(Point::PlaceItem, || fs::rename(from, to)).map_err(IngestError::io("rename to", to))
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), IngestError> {
    let mut file = File::create(path).map_err(IngestError::io("create", path))?;
    write_all(Point::WriteIndex, &mut file, bytes)
        .and_then(|()| file.sync_all())
        .map_err(IngestError::io("write", path))
}

fn sync(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}
