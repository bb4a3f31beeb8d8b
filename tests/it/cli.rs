//! The command line, run as a user runs it: what is data and what is talk, exit codes, what is left behind.

use std::{
    path::Path,
    process::{Command, Output},
};

use serde_json::Value;

fn lorad(args: &[&str], folder: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_lorad"))
        .args(args)
        .current_dir(folder)
        .env("LORAD_STORAGE__DATA_DIR", folder.join("data"))
        .output()
        .expect("lorad starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn asset(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("assets")
        .join(name)
        .display()
        .to_string()
}

#[test]
fn a_wrong_command_line_exits_with_2_and_says_so_on_stderr() {
    let folder = tempfile::tempdir().unwrap();
    let run = lorad(&["train", "--bose", "x"], folder.path());
    assert_eq!(run.status.code(), Some(2));
    assert!(run.stdout.is_empty());
    assert!(text(&run.stderr).contains("--bose"));
}

#[test]
fn openapi_and_families_print_nothing_but_json_on_stdout() {
    let folder = tempfile::tempdir().unwrap();
    let document: Value = serde_json::from_slice(&lorad(&["openapi"], folder.path()).stdout).unwrap();
    assert!(document["openapi"].as_str().unwrap().starts_with("3.1"));
    assert!(document["paths"].get("/jobs").is_some());
    let schema: Value = serde_json::from_slice(&lorad(&["families", "sd1", "--json"], folder.path()).stdout).unwrap();
    assert!(schema["properties"].get("lora_rank").is_some());
}

#[test]
fn an_unknown_family_is_refused_and_the_known_ones_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let run = lorad(&["families", "sd9"], folder.path());
    assert_eq!(run.status.code(), Some(1));
    assert!(text(&run.stderr).contains("sd1"));
}

#[test]
fn doctor_finds_the_bundled_base_and_reports_as_json() {
    let folder = tempfile::tempdir().unwrap();
    let run = lorad(&["doctor", "--json"], folder.path());
    assert_eq!(run.status.code(), Some(0), "{}", text(&run.stderr));
    let report: Value = serde_json::from_slice(&run.stdout).unwrap();
    let ids: Vec<_> = report["base_models"]
        .as_array()
        .unwrap()
        .iter()
        .map(|model| &model["id"])
        .collect();
    assert!(ids.iter().any(|id| *id == "demo-icons"), "{ids:?}");
    assert_eq!(report["devices"][0], "cpu");
}

#[test]
fn healthcheck_fails_when_nobody_answers() {
    let folder = tempfile::tempdir().unwrap();
    // Port 9 (discard) of loopback: nobody listens there.
    let run = lorad(&["healthcheck", "http://127.0.0.1:9"], folder.path());
    assert_eq!(run.status.code(), Some(1));
}

#[test]
fn serving_other_machines_without_keys_is_refused_unless_told() {
    let folder = tempfile::tempdir().unwrap();
    let run = lorad(&["serve", "--bind", "0.0.0.0:0"], folder.path());
    assert_eq!(run.status.code(), Some(1));
    assert!(
        text(&run.stderr).contains("--insecure-no-auth"),
        "{}",
        text(&run.stderr)
    );
}

#[test]
fn every_wrong_option_of_train_is_named_at_once_and_nothing_is_left_behind() {
    let folder = tempfile::tempdir().unwrap();
    let data = asset("silhouettes.zip");
    let run = lorad(
        &[
            "train",
            "--base",
            "demo-icons",
            "--data",
            &data,
            "--out",
            "out",
            "--set",
            "lora_rank=0",
            "--set",
            "no_such=1",
        ],
        folder.path(),
    );
    assert_eq!(run.status.code(), Some(1));
    let stderr = text(&run.stderr);
    assert!(stderr.contains("lora_rank") && stderr.contains("no_such"), "{stderr}");
    assert!(!folder.path().join("out").exists());
}

#[test]
fn train_writes_its_results_pictures_and_figures_and_removes_its_working_folder() {
    let folder = tempfile::tempdir().unwrap();
    let data = asset("silhouettes.zip");
    let run = lorad(
        &[
            "train",
            "--base",
            "demo-icons",
            "--data",
            &data,
            "--out",
            "out",
            "--name",
            "icons",
            "--set",
            "max_train_steps=3",
            "--set",
            "batch_size=2",
            "--prompt",
            "silhouette icon of rocket",
            "--metrics",
            "steps.jsonl",
        ],
        folder.path(),
    );
    assert_eq!(run.status.code(), Some(0), "{}", text(&run.stderr));
    // stdout is the list of result files, each of which is there.
    let stdout = text(&run.stdout);
    let files: Vec<_> = stdout.lines().map(Path::new).collect();
    assert!(files.iter().all(|file| file.is_file()), "{stdout}");
    for name in [
        "pytorch_lora_weights.safetensors",
        "icons-kohya.safetensors",
        "icons-peft.zip",
        "receipt.json",
    ] {
        assert!(
            folder.path().join("out").join(name).is_file(),
            "{name} is missing:\n{stdout}"
        );
    }
    assert!(std::fs::read_dir(folder.path().join("out/samples")).unwrap().count() >= 2);
    let figures = std::fs::read_to_string(folder.path().join("steps.jsonl")).unwrap();
    assert_eq!(figures.lines().count(), 3);
    let hidden = std::fs::read_dir(folder.path().join("out")).unwrap();
    assert!(
        hidden
            .flatten()
            .all(|entry| !entry.file_name().to_string_lossy().starts_with('.'))
    );

    // On from there: the adapter decides about its sizes.
    let on = |set: &str| {
        let arguments = [
            "train",
            "--base",
            "demo-icons",
            "--data",
            &data,
            "--out",
            "on",
            "--set",
            set,
            "--init-adapter",
            "out/icons-kohya.safetensors",
        ];
        lorad(&arguments, folder.path())
    };
    let run = on("max_train_steps=1");
    assert_eq!(run.status.code(), Some(0), "{}", text(&run.stderr));
    let run = on("lora_rank=4");
    assert_eq!(run.status.code(), Some(1));
    assert!(text(&run.stderr).contains("decides lora_rank"), "{}", text(&run.stderr));
}

#[test]
fn the_decoder_of_uploaded_pictures_reads_nothing_outside_its_folder_and_doctor_says_whether_it_can_be_confined() {
    use std::io::Write as _;
    let (inside, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for folder in [&inside, &outside] {
        std::fs::write(folder.path().join("real.png"), crate::corpus::png(40, 30)).unwrap();
    }
    std::os::unix::fs::symlink(outside.path().join("real.png"), inside.path().join("link.png")).unwrap();
    let request = |name: &str| {
        let thumbnail = inside.path().join(format!("{name}-thumb.png"));
        serde_json::json!({"file": inside.path().join(name), "thumbnail": thumbnail, "max_pixels": 10_000})
    };
    let mut child = Command::new(env!("CARGO_BIN_EXE_lorad"))
        .arg("inspect-images")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let list = Value::from(vec![request("real.png"), request("link.png")]).to_string();
    child.stdin.take().unwrap().write_all(list.as_bytes()).unwrap();
    let output = text(&child.wait_with_output().unwrap().stdout);
    let verdicts: Vec<Value> = output
        .lines()
        .skip(1)
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(
        (&verdicts[0]["width"], verdicts.len()),
        (&Value::from(40), 2),
        "{output}"
    );
    assert!(inside.path().join("real.png-thumb.png").exists(), "no thumbnail");

    let report: Value = serde_json::from_slice(&lorad(&["doctor", "--json"], inside.path()).stdout).unwrap();
    let check = report["checks"]
        .as_array()
        .unwrap()
        .iter()
        .find(|check| check["name"] == "sandbox");
    let check = check.expect("doctor says nothing about the sandbox");
    let has_landlock = check["detail"].as_str().unwrap().contains("Landlock yes");
    let was_refused = verdicts[1].get("width").is_none();
    assert_eq!(was_refused, has_landlock, "{output}\n{check:#}");
    // Without it, someone is told.
    assert!(
        has_landlock || !check["hint"].as_str().unwrap_or("").is_empty(),
        "{check:#}"
    );
}
