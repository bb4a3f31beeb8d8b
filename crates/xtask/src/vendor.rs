//! The vendored browser files: each is listed in `static/vendor/VENDOR.toml` with its source, licence and SHA-256, and is
//! that file byte for byte.

use std::{collections::BTreeMap, fs, path::Path};

use serde::Deserialize;
use sha2::{Digest, Sha256};
use walkdir::WalkDir;

/// `static/vendor/VENDOR.toml`.
#[derive(Deserialize)]
struct Manifest {
    #[serde(default)]
    file: Vec<Entry>,
}

/// One vendored file.
#[derive(Deserialize)]
struct Entry {
    /// Below `static/vendor/`.
    path: String,
    /// Package and version, e.g. `npm:uplot@1.6.32`.
    source: String,
    /// SPDX expression.
    license: String,
    /// Hex.
    sha256: String,
}

/// Every way in which `static/vendor` and its manifest differ; empty if none, or if nothing is vendored.
pub(crate) fn check(root: &Path) -> Vec<String> {
    let dir = root.join("static/vendor");
    if !dir.is_dir() {
        return Vec::new();
    }
    let manifest = match fs::read_to_string(dir.join("VENDOR.toml")) {
        Ok(text) => text,
        Err(error) => return vec![format!("static/vendor/VENDOR.toml: {error}")],
    };
    let files = WalkDir::new(&dir)
        .into_iter()
        .filter_map(Result::ok)
        .filter(|entry| entry.file_type().is_file())
        .filter_map(|entry| {
            let name = entry.path().strip_prefix(&dir).ok()?.to_str()?.to_owned();
            Some((name, hex::encode(Sha256::digest(fs::read(entry.path()).ok()?))))
        })
        .collect();
    compare(&manifest, &files)
}

fn compare(manifest: &str, files: &BTreeMap<String, String>) -> Vec<String> {
    let manifest: Manifest = match toml::from_str(manifest) {
        Ok(manifest) => manifest,
        Err(error) => return vec![format!("static/vendor/VENDOR.toml: {error}")],
    };
    let mut problems = Vec::new();
    for entry in &manifest.file {
        match files.get(&entry.path) {
            None => problems.push(format!(
                "static/vendor/{}: listed in VENDOR.toml, but missing",
                entry.path
            )),
            Some(found) if *found != entry.sha256 => {
                problems.push(format!(
                    "static/vendor/{}: sha256 is {found}, not {}",
                    entry.path, entry.sha256
                ));
            }
            Some(_) => {}
        }
        if entry.source.is_empty() || entry.license.is_empty() {
            problems.push(format!(
                "static/vendor/{}: VENDOR.toml gives no source or licence",
                entry.path
            ));
        }
    }
    for name in files.keys() {
        // Licence texts lie beside the files that they cover.
        let exempt = name == "VENDOR.toml" || name.to_ascii_uppercase().contains("LICENSE");
        if !exempt && !manifest.file.iter().any(|entry| entry.path == *name) {
            problems.push(format!("static/vendor/{name}: not listed in VENDOR.toml"));
        }
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(sha256: &str) -> String {
        format!("[[file]]\npath = \"a.js\"\nsource = \"npm:a@1\"\nlicense = \"MIT\"\nsha256 = \"{sha256}\"\n")
    }

    fn files(names: &[(&str, &str)]) -> BTreeMap<String, String> {
        names
            .iter()
            .map(|(name, hash)| ((*name).to_owned(), (*hash).to_owned()))
            .collect()
    }

    #[test]
    fn a_listed_file_with_the_right_hash_passes() {
        assert_eq!(
            compare(
                &manifest("aa"),
                &files(&[("a.js", "aa"), ("LICENSE-a", "bb"), ("VENDOR.toml", "cc")])
            ),
            [""; 0]
        );
    }

    #[test]
    fn a_changed_a_missing_and_an_unlisted_file_are_each_found() {
        assert_eq!(compare(&manifest("aa"), &files(&[("a.js", "changed")])).len(), 1);
        assert_eq!(compare(&manifest("aa"), &files(&[])).len(), 1);
        assert_eq!(
            compare(&manifest("aa"), &files(&[("a.js", "aa"), ("b.js", "bb")])).len(),
            1
        );
    }
}
