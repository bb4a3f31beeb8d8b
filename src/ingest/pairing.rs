//! Which caption belongs to which picture. Every file that finds no partner is named.
//!
//! Two ways, never mixed for one picture: a sidecar (`a.png` with `a.txt` or `a.caption`), or a row of a table
//! (`metadata.jsonl`/`metadata.csv`, names relative to the table's folder). A picture without either takes the name of its
//! folder, if that is one of kohya's (`10_red apple/`): ten times an epoch, captioned `red apple`. Pictures below a folder
//! `reg` are regularisation images. `a.mask.png`, or `masks/a.png`, is the mask of `a.png` (or `.jpg`, `.webp`).

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs,
};

use lorad_proto::dataset::Verdict;

use super::{
    Findings, IngestError, Limits, RawFile,
    archive::{Magic, magic},
    captions::{self, MAX_REPEATS, Row},
    names,
};

/// Rows at fault that are named per table; the rest are counted.
const MAX_ROW_FAULTS: usize = 100;

/// A picture, with its caption unless that was refused.
#[derive(Debug)]
pub(super) struct Candidate {
    pub(super) raw: RawFile,
    pub(super) caption: Option<String>,
    /// Extension to store it under, from its content.
    pub(super) extension: &'static str,
    /// How often an epoch shows it.
    pub(super) repeats: u32,
    /// Whether it is a regularisation image.
    pub(super) is_reg: bool,
    /// Where its loss counts, and the extension to store that under.
    pub(super) mask: Option<(RawFile, &'static str)>,
}

/// Sorts files into pictures and captions and pairs them. Pictures come back in order of name, also those without a
/// usable caption, so that they are looked at too and all errors are found at once.
pub(super) fn pair(raw: Vec<RawFile>, limits: &Limits, findings: &mut Findings) -> Result<Vec<Candidate>, IngestError> {
    let mut pictures = BTreeMap::new();
    let mut sidecars = BTreeMap::new();
    let mut tables = Vec::new();
    for file in raw {
        let base = file.name.rsplit('/').next().unwrap_or(&file.name).to_ascii_lowercase();
        let (_, extension) = names::split_extension(&base);
        match (base.as_str(), extension) {
            ("metadata.jsonl" | "metadata.csv", _) => tables.push(file),
            (_, "txt" | "caption") => {
                sidecars.insert(file.name.clone(), file);
            }
            (_, extension) => sort_by_content(file, extension, &mut pictures, findings),
        }
    }
    if let [first, second, ..] = tables.as_slice()
        && parent(&first.name) == parent(&second.name)
    {
        let detail = format!("{} is there too; keep one table", first.name);
        findings.refuse(&second.name, "metadata.two_tables", detail);
    }
    let mut masks = take_masks(&mut pictures, findings);
    let rows = read_tables(&tables, &pictures, findings)?;
    let mut by_stem: HashMap<&str, Vec<&RawFile>> = HashMap::new();
    for sidecar in sidecars.values() {
        by_stem
            .entry(names::split_extension(&sidecar.name).0)
            .or_default()
            .push(sidecar);
    }
    refuse_shared_stems(&pictures, findings);
    let table_covers = |name: &str| tables.iter().any(|t| name.starts_with(parent(&t.name)));

    let mut captions: HashMap<String, Option<String>> = HashMap::new();
    for name in pictures.keys() {
        let stem = names::split_extension(name).0;
        let beside = by_stem.remove(stem).unwrap_or_default();
        let row = rows.get(name);
        let caption = match (row, beside.as_slice()) {
            (Some(row), []) => checked_row(name, row, limits, findings),
            (None, [sidecar]) => checked_sidecar(sidecar, limits, findings)?,
            (None, []) if folder_of(name).is_some_and(|(_, class)| !class.is_empty()) => {
                let class = folder_of(name).map(|(_, class)| class).unwrap_or_default();
                match captions::caption(class, limits.max_caption_chars) {
                    Ok(caption) => {
                        let detail = format!("no caption: it takes its folder's name, {:?}", caption.text);
                        findings.note(name, Verdict::Warning, "caption.from_folder", detail);
                        Some(caption.text)
                    }
                    Err((code, detail)) => {
                        findings.refuse(name, code, detail);
                        None
                    }
                }
            }
            (None, []) => {
                let (code, detail) = if table_covers(name) {
                    (
                        "image.no_caption",
                        "no row of the metadata table names this picture".to_owned(),
                    )
                } else {
                    let base = stem.rsplit('/').next().unwrap_or(stem);
                    (
                        "image.no_caption",
                        format!("no caption: expected {base}.txt or {base}.caption beside it"),
                    )
                };
                findings.refuse(name, code, detail);
                None
            }
            (Some(_), [sidecar, ..]) => {
                let detail = format!("{name} has a caption in the metadata table too");
                findings.refuse(&sidecar.name, "caption.two_captions", detail);
                None
            }
            (None, [first, second, ..]) => {
                let detail = format!("{name} has a caption in {} too", first.name);
                findings.refuse(&second.name, "caption.two_captions", detail);
                None
            }
        };
        for sidecar in beside {
            findings.ok(&sidecar.name);
        }
        captions.insert(name.clone(), caption);
    }
    let mut orphans: Vec<&RawFile> = by_stem.into_values().flatten().collect();
    orphans.sort_by(|a, b| a.name.cmp(&b.name));
    // A caption whose picture was refused has lost its partner by that fault, which is named already.
    let refused: HashSet<String> = findings.refused.iter().map(|(file, ..)| stem_of(file)).collect();
    for orphan in orphans {
        let stem = names::split_extension(&orphan.name).0;
        if refused.contains(stem) {
            findings.ok(&orphan.name);
            continue;
        }
        let detail = format!("a caption without its picture: no {stem}.png, .jpg or .webp in the upload");
        findings.refuse(&orphan.name, "caption.no_image", detail);
    }
    for table in &tables {
        findings.ok(&table.name);
    }
    for name in pictures.keys() {
        if folder_of(name).is_some_and(|(times, _)| !(1..=MAX_REPEATS).contains(&times)) {
            let detail =
                format!("the number in front of its folder's name must be 1 to {MAX_REPEATS}: repeats per epoch");
            findings.refuse(name, "folder.bad_repeats", detail);
        }
    }
    Ok(pictures
        .into_values()
        .map(|(raw, extension)| {
            let row = rows.get(&raw.name).map(|(_, row)| row);
            let folders: Vec<&str> = parent(&raw.name).split('/').collect();
            Candidate {
                caption: captions.remove(&raw.name).flatten(),
                repeats: row
                    .and_then(|row| row.repeats)
                    .or_else(|| folder_of(&raw.name).map(|(times, _)| times))
                    .unwrap_or(1),
                is_reg: row
                    .and_then(|row| row.is_reg)
                    .unwrap_or_else(|| folders.iter().any(|f| f.eq_ignore_ascii_case("reg"))),
                mask: masks.remove(names::split_extension(&raw.name).0),
                raw,
                extension,
            }
        })
        .collect())
}

/// What kohya's folder names say: `10_red apple` is 10 repeats of `red apple`.
///
/// # Source
/// kohya sd-scripts 48d368f `library/config_util.py`, `generate_dreambooth_subsets_config_by_subdirs`.
fn folder_of(name: &str) -> Option<(u32, &str)> {
    let folder = parent(name).trim_end_matches('/').rsplit('/').next()?;
    let (times, class) = folder.split_once('_')?;
    let digits = !times.is_empty() && times.bytes().all(|b| b.is_ascii_digit());
    digits.then(|| (times.parse().unwrap_or(u32::MAX), class))
}

/// Takes masks out of the pictures, by the stem of the picture that each belongs to. A mask without its picture is named.
fn take_masks(pictures: &mut Pictures, findings: &mut Findings) -> HashMap<String, (RawFile, &'static str)> {
    let target = |name: &str| {
        let stem = names::split_extension(name).0;
        if let Some(target) = stem.strip_suffix(".mask") {
            return Some(target.to_owned());
        }
        let at = stem
            .rfind("masks/")
            .filter(|&at| at == 0 || stem[..at].ends_with('/'))?;
        Some(format!("{}{}", &stem[..at], &stem[at + "masks/".len()..]))
    };
    let stems: HashSet<String> = pictures
        .keys()
        .filter(|name| target(name).is_none())
        .map(|name| stem_of(name))
        .collect();
    let found: Vec<(String, String)> = pictures
        .keys()
        .filter_map(|name| Some((name.clone(), target(name)?)))
        .collect();
    let mut masks: HashMap<String, (RawFile, &'static str)> = HashMap::new();
    for (name, stem) in found {
        let Some(mask) = pictures.remove(&name) else { continue };
        if !stems.contains(&stem) {
            let detail = format!("a mask without its picture: no {stem}.png, .jpg or .webp in the upload");
            findings.refuse(&name, "mask.no_image", detail);
        } else if let Some((earlier, _)) = masks.get(&stem) {
            let detail = format!("{} is a mask of the same picture", earlier.name);
            findings.refuse(&name, "mask.two_masks", detail);
        } else {
            masks.insert(stem, mask);
        }
    }
    masks
}

type Pictures = BTreeMap<String, (RawFile, &'static str)>;

/// A picture is what its bytes say; an extension that promises another kind of file is refused.
fn sort_by_content(file: RawFile, extension: &str, pictures: &mut Pictures, findings: &mut Findings) {
    let named_picture = matches!(
        extension,
        "png"
            | "jpg"
            | "jpeg"
            | "jpe"
            | "webp"
            | "gif"
            | "bmp"
            | "tif"
            | "tiff"
            | "avif"
            | "heic"
            | "heif"
            | "svg"
            | "exr"
    );
    let kind = match magic(&file.head) {
        Magic::Png => "png",
        Magic::Jpeg => "jpg",
        Magic::Webp => "webp",
        Magic::Zip | Magic::Gzip | Magic::Tar | Magic::OtherArchive(_) => {
            findings.refuse(
                &file.name,
                "entry.nested_archive",
                "an archive inside the archive is not read",
            );
            return;
        }
        _ if file.bytes == 0 => {
            let code = if named_picture { "image.empty" } else { "file.empty" };
            findings.refuse(&file.name, code, "the file is empty");
            return;
        }
        Magic::Other(what) => {
            let code = if named_picture {
                "image.unsupported_format"
            } else {
                "file.unsupported"
            };
            let detail = format!("it is {what}; pictures must be PNG, JPEG or WebP");
            findings.refuse(&file.name, code, detail);
            return;
        }
        Magic::Unknown if named_picture => {
            let detail = "its content is not a picture in PNG, JPEG or WebP format";
            findings.refuse(&file.name, "image.unsupported_format", detail);
            return;
        }
        Magic::Unknown => {
            let detail =
                "neither a picture (PNG, JPEG, WebP) nor a caption (.txt, .caption, metadata.jsonl, metadata.csv)";
            findings.refuse(&file.name, "file.unsupported", detail);
            return;
        }
    };
    if !named_picture {
        let detail = "it is a picture, but its name does not end in .png, .jpg or .webp";
        findings.refuse(&file.name, "file.wrong_extension", detail);
        return;
    }
    let fits = match kind {
        "jpg" => matches!(extension, "jpg" | "jpeg" | "jpe"),
        kind => extension == kind,
    };
    if !fits {
        let detail = format!("the content is {kind}, not {extension}; it is read by its content");
        findings.note(&file.name, Verdict::Warning, "image.wrong_extension", detail);
    }
    pictures.insert(file.name.clone(), (file, kind));
}

/// `a.png` and `a.jpg` would share one sidecar.
fn refuse_shared_stems(pictures: &Pictures, findings: &mut Findings) {
    let mut stems: HashMap<&str, &str> = HashMap::new();
    for name in pictures.keys() {
        if let Some(earlier) = stems.insert(names::split_extension(name).0, name) {
            let detail = format!("{earlier} differs only by its extension, so one caption would belong to both");
            findings.refuse(name, "image.ambiguous_name", detail);
        }
    }
}

fn stem_of(name: &str) -> String {
    names::split_extension(name).0.to_owned()
}

/// The folder of a name, with its slash; empty at the top.
fn parent(name: &str) -> &str {
    name.rfind('/').map_or("", |i| &name[..=i])
}

fn read_tables(
    tables: &[RawFile],
    pictures: &Pictures,
    findings: &mut Findings,
) -> Result<HashMap<String, (String, Row)>, IngestError> {
    let mut by_picture: HashMap<String, (String, Row)> = HashMap::new();
    let refused: HashSet<String> = findings.refused.iter().map(|(file, ..)| file.clone()).collect();
    for table in tables {
        let bytes = fs::read(&table.path).map_err(IngestError::io("read", &table.path))?;
        let text = match captions::utf8(&bytes) {
            Ok(text) => text,
            Err((code, detail)) => {
                findings.refuse(&table.name, code, detail);
                continue;
            }
        };
        let (rows, faults) = if table.name.to_ascii_lowercase().ends_with(".csv") {
            captions::csv(text)
        } else {
            captions::jsonl(text)
        };
        let mut faults: Vec<(&'static str, String)> = faults;
        if rows.is_empty() && faults.is_empty() {
            faults.push(("metadata.empty", "the table has no rows".to_owned()));
        }
        for row in rows {
            let line = row.line;
            let picture = names::checked(&row.file_name).map(|name| format!("{}{name}", parent(&table.name)));
            match picture {
                // Refused before, and named as such.
                Ok(picture) if refused.contains(&picture) => {}
                Ok(picture) if !pictures.contains_key(&picture) => faults.push((
                    "metadata.no_image",
                    format!(
                        "line {line} names {}, which is not in the upload",
                        names::shown(row.file_name.as_bytes())
                    ),
                )),
                Ok(picture) => {
                    if let Some((_, earlier)) = by_picture.get(&picture) {
                        faults.push((
                            "metadata.duplicate_row",
                            format!("lines {} and {line} both name {picture}", earlier.line),
                        ));
                    } else {
                        by_picture.insert(picture, (table.name.clone(), row));
                    }
                }
                Err((_, detail)) => faults.push(("metadata.bad_row", format!("line {line}: in `file_name`, {detail}"))),
            }
        }
        let more = faults.len().saturating_sub(MAX_ROW_FAULTS);
        for (code, detail) in faults.into_iter().take(MAX_ROW_FAULTS) {
            findings.refuse(&table.name, code, detail);
        }
        if more > 0 {
            findings.refuse(
                &table.name,
                "metadata.bad_row",
                format!("{more} more rows are at fault"),
            );
        }
    }
    Ok(by_picture)
}

fn checked_row(
    picture: &str,
    (table, row): &(String, Row),
    limits: &Limits,
    findings: &mut Findings,
) -> Option<String> {
    match captions::caption(&row.text, limits.max_caption_chars) {
        Ok(caption) => {
            if let Some((code, detail)) = caption.warning {
                findings.note(picture, Verdict::Warning, code, detail);
            }
            Some(caption.text)
        }
        Err((code, detail)) => {
            findings.refuse(table, code, format!("line {} ({picture}): {detail}", row.line));
            None
        }
    }
}

fn checked_sidecar(file: &RawFile, limits: &Limits, findings: &mut Findings) -> Result<Option<String>, IngestError> {
    if file.bytes > limits.max_caption_bytes {
        let detail = format!("{} bytes are too many for a caption", file.bytes);
        findings.refuse(&file.name, "caption.too_long", detail);
        return Ok(None);
    }
    let bytes = fs::read(&file.path).map_err(IngestError::io("read", &file.path))?;
    let caption = captions::utf8(&bytes).and_then(|text| captions::caption(text, limits.max_caption_chars));
    Ok(match caption {
        Ok(caption) => {
            if let Some((code, detail)) = caption.warning {
                findings.note(&file.name, Verdict::Warning, code, detail);
            }
            Some(caption.text)
        }
        Err((code, detail)) => {
            findings.refuse(&file.name, code, detail);
            None
        }
    })
}
