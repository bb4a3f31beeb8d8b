//! The HTTP API against its own description: schemathesis makes requests from `/openapi.json`, valid ones, invalid ones and
//! chains of them, and none may be answered with 5xx.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::LazyLock,
};

use anyhow::{Context, Result, ensure};
use regex::Regex;
use serde_json::{Value, json};

use crate::{exec, provision, server::Server};

/// Cases of the quick form.
pub(crate) const QUICK_CASES: u64 = 2000;
/// Requests that each phase makes per operation in one round.
const EXAMPLES_PER_ROUND: &str = "3";
/// Where what a round may use lies: real ids, so that requests get past the lookup. `{id}` in paths.
const REAL: [(&str, &str); 2] = [("models", "demo-icons"), ("families", "sd1")];

/// schemathesis' settings: the ids of things that are there.
fn write_settings(server: &Server, dir: &Path) -> Result<PathBuf> {
    let mut job = server.ask("GET", "/demo", None)?;
    job["hyperparameters"]["max_train_steps"] = json!(4);
    job["hyperparameters"]["batch_size"] = json!(1);
    job["sampling"] = json!({"prompts": []});
    let job = server.ask("POST", "/jobs", Some(&job))?;
    let datasets = server.ask("GET", "/datasets", None)?;
    let id = |value: &Value| value["id"].as_str().unwrap_or_default().to_owned();
    let made = [("jobs", id(&job)), ("datasets", id(&datasets["data"][0]))];
    let known = REAL.map(|(what, id)| (what, id.to_owned()));
    let mut text = String::new();
    for (what, id) in made.into_iter().chain(known) {
        writeln!(
            text,
            "[[operations]]\ninclude-path-regex = \"^/{what}/[{{]id[}}]\"\nparameters = {{ \"path.id\" = \"{id}\" }}"
        )?;
    }
    let file = dir.join("schemathesis.toml");
    fs::write(&file, text)?;
    Ok(file)
}

/// Runs rounds, each with another seed, until `cases` requests were made. Every other round uses the ids of things that are
/// there. How many requests were made.
///
/// # Errors
/// If a request was answered with 5xx or not at all, with the seed that makes it again.
pub(crate) fn run(root: &Path, cases: u64, first_seed: u64) -> Result<u64> {
    let program = provision::schemathesis(root)?;
    let dir = tempfile::tempdir().context("make a folder for the server")?;
    let mut server = Server::start(root, &dir.path().join("data"), &[])?;
    let settings = write_settings(&server, dir.path())?;
    let (mut done, mut seed) = (0, first_seed);
    while done < cases {
        let mut command = Command::new(&program);
        if (seed - first_seed).is_multiple_of(2) {
            command.arg("--config-file").arg(&settings);
        }
        command
            .args([
                "run",
                "--no-color",
                "--warnings",
                "off",
                "--checks",
                "not_a_server_error",
            ])
            .args(["--continue-on-failure", "--request-timeout", "60"])
            // An event stream ends when its job does; tests/it/viewers.rs has its cursors.
            .args(["--exclude-path", "/jobs/{id}/events"])
            .args(["--max-examples", EXAMPLES_PER_ROUND, "--seed", &seed.to_string()])
            .arg(format!("http://{}/openapi.json", server.address))
            .current_dir(dir.path());
        let streamed = exec::stream(&mut command)?;
        let n = generated(&streamed.stdout);
        ensure!(
            streamed.ok && n > 0 && server.is_up()?,
            "schemathesis found a fault; again with `cargo xtask schemathesis --seed {seed}`"
        );
        done += n;
        seed += 1;
    }
    println!(
        "schemathesis: {done} requests, 0 answered with 5xx (seeds {first_seed} to {})",
        seed - 1
    );
    Ok(done)
}

/// The number in `856 generated, 856 passed`.
fn generated(stdout: &str) -> u64 {
    #[expect(
        clippy::expect_used,
        reason = "invariant: a constant pattern, covered by the test below"
    )]
    static CASES: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"(\d+) generated").expect("invariant: a valid pattern"));
    CASES
        .captures(stdout)
        .and_then(|found| found[1].parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_requests_is_read_and_silence_is_none() {
        assert_eq!(generated("Test cases:\n  856 generated, 856 passed\n"), 856);
        assert_eq!(generated("Error"), 0);
    }
}
