//! `lorad fsck` and `lorad backup`: the data directory as a whole.

use anyhow::Result;
use lorad::{
    app::DataDir,
    upkeep::{backup, fsck},
};

use super::{
    Exit,
    args::{Backup, Fsck},
    config, runtime,
    tables::{size, table},
};

pub(crate) fn run_fsck(args: &Fsck) -> Result<Exit> {
    let config = config::load(&args.settings, &[])?;
    let data = DataDir::new(absolute(&config.storage.data_dir)?);
    let findings = runtime()?.block_on(fsck(&data))?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&findings)?);
    } else if findings.is_empty() {
        eprintln!("{}: everything is as it should be", data.root().display());
    } else {
        let row = |f: &lorad::upkeep::Finding| vec![f.code.to_owned(), f.at.clone(), f.detail.clone()];
        println!("{}", table(&findings.iter().map(row).collect::<Vec<_>>()));
    }
    Ok(if findings.is_empty() { Exit::Ok } else { Exit::Error })
}

pub(crate) fn run_backup(args: &Backup) -> Result<Exit> {
    let config = config::load(&args.settings, &[])?;
    let data = DataDir::new(absolute(&config.storage.data_dir)?);
    let made = runtime()?.block_on(backup(&data, &args.to))?;
    eprintln!(
        "{} files ({}) and the database; `lorad fsck --data-dir {}` checks them",
        made.files,
        size(made.bytes),
        args.to.display()
    );
    Ok(Exit::Ok)
}

fn absolute(dir: &std::path::Path) -> std::io::Result<std::path::PathBuf> {
    dir.canonicalize().or_else(|_| std::path::absolute(dir))
}
