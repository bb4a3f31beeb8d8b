//! `lorad models`: base models on this machine, and finding one by id or folder.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::Ordering,
};

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use lorad::{
    builtin::{self, BUNDLED_MODEL},
    config::Config,
    domain::ModelId,
    hub::{self, Hub, HubId},
    trainer::TrainerCatalog,
};
use lorad_proto::{
    catalog::{BaseModelInfo, Catalog},
    problem::Problem,
};
use serde::Serialize;
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;

use super::{
    Exit,
    args::{Models, ModelsCommand, Pull, Settings},
    config, print_problem_details, runtime,
    tables::{size, table},
};

/// A base model folder and what it is, or what is wrong with it.
#[derive(Debug, Serialize)]
pub(crate) struct Found {
    /// The name that a job's `base_model` takes.
    pub(crate) id: String,
    path: PathBuf,
    #[serde(skip_serializing_if = "Option::is_none")]
    info: Option<BaseModelInfo>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) problem: Option<Problem>,
}

/// Runs the command.
pub(crate) fn run(args: &Models) -> Result<Exit> {
    if let Some(ModelsCommand::Pull(pull)) = &args.command {
        return self::pull(pull);
    }
    let found = find(&config::load(&args.settings, &[])?)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&found)?);
        return Ok(Exit::Ok);
    }
    println!("{}", listing(&found));
    for model in &found {
        if let Some(problem) = &model.problem {
            eprintln!("{}: {problem}", model.id);
            print_problem_details(problem);
        }
    }
    Ok(Exit::Ok)
}

/// Downloads a model into the data folder; the folder's name is the model's id.
fn pull(args: &Pull) -> Result<Exit> {
    let hub_id: HubId = args
        .hub_id
        .parse()
        .map_err(|why: String| anyhow::anyhow!("{:?}: {why}", args.hub_id))?;
    let id: ModelId = args.id.clone().unwrap_or_else(|| hub_id.slug()).parse()?;
    let config = config::load(&args.settings, &[])?;
    let models = config.storage.data_dir.join("models");
    let (dir, staging) = (models.join(id.as_str()), models.join(format!(".hub-{id}")));
    if dir.exists() {
        bail!("{} is there already; choose another name with --id", dir.display());
    }
    let bar = ProgressBar::new(0);
    if let Ok(style) =
        ProgressStyle::with_template("{prefix:>10} {wide_bar} {bytes}/{total_bytes} {binary_bytes_per_sec}")
    {
        bar.set_style(style.progress_chars("━╸ "));
    }
    let done = runtime()?.block_on(async {
        let hub = Hub::new(&config.models.hub_endpoint)?;
        let snapshot = hub.snapshot(&hub_id).await?;
        let files = hub::choose(&snapshot)?;
        eprintln!("{}@{}: {} files", snapshot.repository, snapshot.commit, files.len());
        let (progress, cancel) = (hub::Progress::default(), CancellationToken::new());
        let pull = hub::pull(&hub, &snapshot, &files, &staging, &progress, &cancel);
        tokio::pin!(pull);
        loop {
            tokio::select! {
                done = &mut pull => return done.map(|()| snapshot.clone()),
                () = tokio::time::sleep(std::time::Duration::from_millis(100)) => {
                    bar.set_length(progress.total_bytes.load(Ordering::Relaxed));
                    bar.set_position(progress.done_bytes.load(Ordering::Relaxed));
                }
                _ = tokio::signal::ctrl_c() => cancel.cancel(),
            }
        }
    });
    bar.finish_and_clear();
    let snapshot = match done {
        Ok(snapshot) => snapshot,
        Err(problem) if problem.code == "hub.cancelled" => {
            eprintln!("stopped; the same command goes on from here");
            return Ok(Exit::Cancelled);
        }
        Err(problem) => return Err(problem.into()),
    };
    let info = TrainerCatalog.inspect_base(&staging)?;
    fs::rename(&staging, &dir).with_context(|| format!("create {}", dir.display()))?;
    eprintln!(
        "{} ({}, {} px, {}){}",
        id,
        info.family,
        info.resolution,
        size(info.bytes),
        if snapshot.licence.is_empty() {
            String::new()
        } else {
            format!(", licence {}", snapshot.licence)
        }
    );
    println!("{}", dir.display());
    Ok(Exit::Ok)
}

/// The bundled base, what lies in the data folder's `models/`, and what lies below the roots of the settings.
pub(crate) fn find(config: &Config) -> Result<Vec<Found>> {
    let models = config.storage.data_dir.join("models");
    let mut found = vec![inspect(BUNDLED_MODEL.to_owned(), bundled(config)?)];
    for root in std::iter::once(&models).chain(&config.models.roots) {
        let Ok(entries) = fs::read_dir(root) else { continue };
        let mut folders: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        folders.sort();
        for folder in folders
            .into_iter()
            // What is being imported or downloaded has a dot in front.
            .filter(|folder| {
                !folder
                    .file_name()
                    .is_some_and(|name| name.as_encoded_bytes().starts_with(b"."))
            })
            .filter(|folder| folder.join("model_index.json").is_file())
        {
            let id = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if id != BUNDLED_MODEL {
                found.push(inspect(id, folder));
            }
        }
    }
    Ok(found)
}

/// Id and absolute folder of a base: a folder as given, or a model found by its id.
pub(crate) fn locate(base: &str, settings: &Settings) -> Result<(String, PathBuf)> {
    let given = Path::new(base);
    if given.is_file() {
        return Ok((
            given.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
            single_file(given, settings)?,
        ));
    }
    if given.is_dir() {
        let path = given.canonicalize().with_context(|| format!("find {base}"))?;
        let id = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        return Ok((id, path));
    }
    let config = config::load(settings, &[])?;
    if base == BUNDLED_MODEL {
        let path = bundled(&config)?.canonicalize().context("find the bundled model")?;
        return Ok((base.to_owned(), path));
    }
    let found = find(&config)?;
    if let Some(model) = found.iter().find(|model| model.id == base) {
        return Ok((
            base.to_owned(),
            model.path.canonicalize().with_context(|| format!("find {base}"))?,
        ));
    }
    let known: Vec<_> = found.iter().map(|model| model.id.as_str()).collect();
    bail!(
        "--base {base}: neither a folder nor a known model; known are {}",
        known.join(", ")
    );
}

/// The folder of a checkpoint in one file: made in the data folder, once per file and state of it.
fn single_file(file: &Path, settings: &Settings) -> Result<PathBuf> {
    let file = file
        .canonicalize()
        .with_context(|| format!("find {}", file.display()))?;
    let metadata = fs::metadata(&file).with_context(|| format!("read {}", file.display()))?;
    let modified = metadata
        .modified()
        .ok()
        .and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok());
    let state = format!("{} {} {:?}", file.display(), metadata.len(), modified);
    let models = config::load(settings, &[])?.storage.data_dir.join("models");
    let dir = models.join(format!("file-{}", &hex::encode(Sha256::digest(state))[..16]));
    if !dir.is_dir() {
        fs::create_dir_all(&models).with_context(|| format!("create {}", models.display()))?;
        let fresh = tempfile::Builder::new()
            .prefix(".import-")
            .tempdir_in(&models)
            .context("make a working folder")?;
        TrainerCatalog.import_single_file(&file, fresh.path())?;
        fs::rename(fresh.keep(), &dir).with_context(|| format!("create {}", dir.display()))?;
    }
    dir.canonicalize().with_context(|| format!("find {}", dir.display()))
}

/// The bundled base, unpacked into the data folder.
fn bundled(config: &Config) -> Result<PathBuf> {
    Ok(builtin::unpack(&config.storage.data_dir.join("models"))?)
}

/// A table of base models.
pub(crate) fn listing(found: &[Found]) -> String {
    let mut rows = vec![
        ["base model", "family", "side", "size", "folder"]
            .map(str::to_owned)
            .to_vec(),
    ];
    rows.extend(found.iter().map(|model| {
        let (family, side, bytes) = match &model.info {
            Some(info) => (info.family.clone(), format!("{} px", info.resolution), size(info.bytes)),
            None => ("cannot be trained".to_owned(), "-".to_owned(), "-".to_owned()),
        };
        vec![model.id.clone(), family, side, bytes, model.path.display().to_string()]
    }));
    table(&rows)
}

fn inspect(id: String, path: PathBuf) -> Found {
    match TrainerCatalog.inspect_base(&path) {
        Ok(info) => Found {
            id,
            path,
            info: Some(info),
            problem: None,
        },
        Err(problem) => Found {
            id,
            path,
            info: None,
            problem: Some(problem),
        },
    }
}
