//! `docs/families/*.md`: one page per model family, printed by the `lorad` binary from the family's own schema, so that
//! the page, the form, the API and the CLI have one source.

use std::{fs, path::Path, process::Command};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::exec;

/// Writes the pages; with `check`, fails if a committed page differs.
///
/// # Errors
/// If the binary cannot be built or run, or a page is out of date.
pub(crate) fn run(root: &Path, check: bool) -> Result<()> {
    exec::build_all()?;
    let lorad = exec::target_dir(root).join("release/lorad");
    let families: Value = serde_json::from_str(&exec::output(Command::new(&lorad).args(["families", "--json"]))?)
        .context("read the list of families")?;
    let ids: Vec<&str> = families
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|f| f["id"].as_str())
        .collect();
    ensure!(!ids.is_empty(), "`lorad families --json` names no family");
    for id in ids {
        let page = exec::output(Command::new(&lorad).args(["families", id, "--markdown"]))?;
        let path = root.join(format!("docs/families/{id}.md"));
        if check {
            let found = fs::read_to_string(&path).unwrap_or_default();
            ensure!(
                found == page,
                "docs/families/{id}.md is out of date: run `cargo xtask docs`"
            );
        } else {
            fs::create_dir_all(root.join("docs/families"))?;
            fs::write(&path, page).with_context(|| format!("write {}", path.display()))?;
            eprintln!("wrote docs/families/{id}.md");
        }
    }
    Ok(())
}
