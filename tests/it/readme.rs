//! The README's curl examples, run as they stand against the real binary. Only `localhost:8080` is replaced, by the address of the
//! server under test.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
};

use serde_json::Value;
use sha2::{Digest, Sha256};

const README: &str = include_str!("../../README.md");

/// The contents of the ```sh blocks that use curl, in order.
fn curl_blocks(markdown: &str) -> Vec<String> {
    let mut blocks = Vec::new();
    let mut block: Option<String> = None;
    for line in markdown.lines() {
        match &mut block {
            None if line == "```sh" => block = Some(String::new()),
            None => {}
            Some(_) if line == "```" => blocks.extend(block.take()),
            Some(text) => {
                text.push_str(line);
                text.push('\n');
            }
        }
    }
    blocks.retain(|block| block.contains("curl "));
    blocks
}

/// `lorad serve` on a free port; ended on drop.
struct Server {
    child: Child,
    /// `127.0.0.1:PORT`.
    authority: String,
}

impl Server {
    fn start(data_dir: &Path) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_lorad"))
            .args(["serve", "--bind", "127.0.0.1:0", "--data-dir"])
            .arg(data_dir)
            .stdout(Stdio::piped())
            .spawn()
            .expect("lorad starts");
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().expect("stdout is piped"))
            .read_line(&mut line)
            .expect("lorad says where it listens");
        let authority = line.trim().strip_prefix("http://").expect("an address").to_owned();
        Self { child, authority }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let pid = self.child.id().to_string();
        // SIGTERM, so that it ends its workers as well.
        let _ = Command::new("kill").arg(&pid).status();
        let _ = self.child.wait();
    }
}

#[test]
fn blocks_are_found_in_order_and_only_those_with_curl() {
    let text = "```sh\ncargo run\n```\n```python\ncurl x\n```\n```sh\ncurl a\ncurl b\n```\n";
    assert_eq!(curl_blocks(text), ["curl a\ncurl b\n"]);
}

#[test]
fn the_readmes_curl_examples_work_as_they_stand() {
    let folder = tempfile::tempdir().unwrap();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for name in ["assets", "configs"] {
        std::os::unix::fs::symlink(root.join(name), folder.path().join(name)).unwrap();
    }
    // A refusal by the server must fail the script, though the examples do not say `--fail`.
    fs::write(folder.path().join(".curlrc"), "fail-with-body\nmax-time = 300\n").unwrap();
    let data = tempfile::tempdir().unwrap();
    let server = Server::start(data.path());

    let blocks = curl_blocks(README);
    assert!(blocks.len() >= 5, "the README has lost its curl examples");
    let script = blocks.join("\n").replace("localhost:8080", &server.authority);
    let run = Command::new("bash")
        .args(["-euxo", "pipefail", "-c", &script])
        .current_dir(folder.path())
        .env("CURL_HOME", folder.path())
        .env_remove("http_proxy")
        .output()
        .expect("bash starts");
    let (stdout, stderr) = (
        String::from_utf8_lossy(&run.stdout),
        String::from_utf8_lossy(&run.stderr),
    );
    assert!(
        run.status.success(),
        "{}\n--- stdout\n{stdout}\n--- stderr\n{stderr}",
        run.status
    );

    // The stream was followed to the job's end, and carried losses on its way.
    assert!(stdout.contains("event: metrics"), "{stdout}");
    assert!(stdout.contains("succeeded"), "{stdout}");
    // What was downloaded is what the receipt vouches for.
    let adapter = fs::read(folder.path().join("pytorch_lora_weights.safetensors")).unwrap();
    let hash = hex::encode(Sha256::digest(&adapter));
    assert!(
        stdout.contains(&hash),
        "the list of files does not name {hash}:\n{stdout}"
    );
    let receipt: Value = serde_json::from_slice(&fs::read(folder.path().join("receipt.json")).unwrap()).unwrap();
    assert!(receipt.is_object());
    // The dry run at the end told the plan and started nothing.
    assert!(stdout.contains("total_steps"), "{stdout}");
}
