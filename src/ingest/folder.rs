//! A folder as an upload, for `lorad train --data FOLDER`. Links are refused, not followed; the same limits hold.

use std::{
    fs::{self, File},
    os::unix::ffi::OsStrExt as _,
    path::Path,
};

use super::{
    Findings, IngestError, Limits, RawFile, Stop,
    archive::{Shelf, Taken, too_many},
    names,
};

/// Deepest nesting that is read.
const MAX_DEPTH: usize = 16;

/// Copies every file of a folder.
pub(super) fn extract(
    root: &Path,
    work: &Path,
    limits: &Limits,
    findings: &mut Findings,
) -> Result<Vec<RawFile>, Stop> {
    let raw = work.join("raw");
    fs::create_dir(&raw).map_err(IngestError::io("create", &raw))?;
    let mut shelf = Shelf::new(raw, limits);
    let mut seen = 0u64;
    let mut open = vec![(root.to_owned(), 0usize)];
    while let Some((dir, depth)) = open.pop() {
        for entry in fs::read_dir(&dir).map_err(IngestError::io("list", &dir))? {
            let entry = entry.map_err(IngestError::io("list", &dir))?;
            seen += 1;
            if seen > limits.max_entries {
                return Err(too_many(limits, seen).into());
            }
            let path = entry.path();
            let relative = path.strip_prefix(root).unwrap_or(&path).as_os_str().as_bytes().to_vec();
            let shown = names::shown(&relative);
            let kind = entry.file_type().map_err(IngestError::io("read", &path))?;
            if kind.is_symlink() {
                findings.refuse(&shown, "entry.symlink", "it is a symbolic link");
            } else if kind.is_dir() && depth < MAX_DEPTH {
                open.push((path, depth + 1));
            } else if kind.is_file() {
                let text = String::from_utf8_lossy(&relative).into_owned();
                let Some(name) = shelf.admit(&relative, &text, false, findings) else {
                    continue;
                };
                let file = File::open(&path).map_err(IngestError::io("open", &path))?;
                let size = file.metadata().map_err(IngestError::io("read", &path))?.len();
                if let Taken::Faulty(code, detail) = shelf.take(&name, file, None, size)? {
                    findings.refuse(&name, code, detail);
                }
            } else {
                findings.refuse(&shown, "entry.special_file", "it is neither a file nor a folder");
            }
        }
    }
    Ok(shelf.files)
}
