//! Settings for the commands: flags on top of environment, file and defaults; and `lorad config`, which shows them.

use anyhow::{Context, Result};
use lorad::config::{Config, DEFAULTS};

use super::{
    Exit,
    args::{Config as Args, ConfigCommand, Settings},
};

/// The settings that the flags, the environment and the file give.
pub(crate) fn load(settings: &Settings, flags: &[(&str, String)]) -> Result<Config> {
    let mut all = flags.to_vec();
    if let Some(dir) = &settings.data_dir {
        let dir = dir.to_str().context("--data-dir: the path is not UTF-8")?;
        all.push(("storage.data_dir", dir.to_owned()));
    }
    Ok(Config::load(settings.config.as_deref(), &all)?)
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> Result<Exit> {
    match &args.command {
        ConfigCommand::Show(settings) => println!("{}", serde_json::to_string_pretty(&load(settings, &[])?)?),
        ConfigCommand::Default => print!("{DEFAULTS}"),
    }
    Ok(Exit::Ok)
}
