//! `lorad inspect-images` (hidden): decodes uploaded pictures in this process, which the server started under limits.

use anyhow::{Context, Result};

use super::Exit;

/// Runs the command.
pub(crate) fn run() -> Result<Exit> {
    let catalog = lorad::trainer::TrainerCatalog;
    lorad::ingest::inspect::run_child(&catalog, std::io::stdin().lock(), std::io::stdout().lock())
        .context("inspect pictures")?;
    Ok(Exit::Ok)
}
