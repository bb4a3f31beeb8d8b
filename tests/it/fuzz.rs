//! Everything that parses what comes from outside, fed with mutated input: no panic, no runaway time or memory, no 5xx.
//!
//! Mutations are structured (lengths and offsets are overwritten with values at their limits, ranges are cut, doubled and
//! swapped, numbers in text grow) and drawn from a seed, which a failure prints: `LORAD_TEST_SEED` plays it again,
//! `LORAD_TEST_FUZZ_S` (or `cargo xtask fuzz --seconds N`) makes it longer. Without coverage guidance, which needs a nightly
//! compiler: the corpus is made so that each parser is entered deep.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use lorad::{
    config::Config,
    ingest::{
        Limits, Source, ingest,
        inspect::{InspectRequest, Inspector},
    },
    trainer::{TrainerCatalog, verified_checkpoint_step},
};
use lorad_proto::{catalog::Catalog as _, command::EventsPost, dataset::ImageVerdict};
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::{
    chaos::Draws,
    client::{Client, demo_job},
    corpus::{Entry, gz, pictures, tar, tar_entry, zip},
};

/// Far more than the slowest machine needs for one input, far less than for ever.
const LONGEST: Duration = Duration::from_secs(30);

fn seconds() -> Duration {
    let given = std::env::var("LORAD_TEST_FUZZ_S")
        .ok()
        .and_then(|text| text.parse().ok());
    given.map_or(Duration::from_millis(800), Duration::from_secs)
}

/// Values at which lengths and offsets go wrong.
const LIMITS: [u64; 12] = [
    0,
    1,
    0x7f,
    0xff,
    0x7fff,
    0xffff,
    0x7fff_ffff,
    0xffff_ffff,
    1 << 53,
    u64::MAX >> 1,
    u64::MAX - 7,
    u64::MAX,
];

/// A few mutations of one input of the corpus, perhaps with a piece of another.
fn mutated(draws: &mut Draws, corpus: &[Vec<u8>]) -> Vec<u8> {
    let pick = |draws: &mut Draws, n: usize| draws.within(0..n.max(1) as u64) as usize;
    let first = pick(draws, corpus.len());
    let mut bytes = corpus[first].clone();
    for _ in 0..draws.within(1..6) {
        let len = bytes.len();
        let at = pick(draws, len);
        // Heads of files and lines are where the structure is.
        let at = if draws.within(0..2) == 0 {
            at.min(pick(draws, 96))
        } else {
            at
        };
        let end = (at + pick(draws, 64)).min(len);
        match draws.within(0..11) {
            0 if len > 0 => bytes[at] ^= 1 << draws.within(0..8),
            1 if len > 0 => bytes[at] = draws.within(0..256) as u8,
            2 => bytes.truncate(at),
            3 => drop(bytes.drain(at..end)),
            4 => {
                let doubled = bytes[at..end].to_vec();
                bytes.splice(at..at, doubled);
            }
            5 => {
                let limit = LIMITS[pick(draws, LIMITS.len())].to_le_bytes();
                let width = [1, 2, 4, 8][pick(draws, 4)].min(len - at);
                bytes[at..at + width].copy_from_slice(&limit[..width]);
            }
            6 => {
                let limit = LIMITS[pick(draws, LIMITS.len())].to_string();
                // A number in text, if there is one after here.
                let from = bytes[at..].iter().position(u8::is_ascii_digit).map(|n| at + n);
                if let Some(from) = from {
                    let digits = bytes[from..].iter().take_while(|byte| byte.is_ascii_digit()).count();
                    bytes.splice(from..from + digits, limit.bytes());
                }
            }
            7 => {
                let word: &[u8] = [
                    b"null".as_slice(),
                    b"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[",
                    b"\"\\ud800\"",
                    b"\xff\xfe",
                    b"../../",
                    b"\0",
                    b"\r\n\r\n",
                    b"-1e999",
                    b"{\"a\":",
                ][pick(draws, 9)];
                bytes.splice(at..at, word.iter().copied());
            }
            8 => {
                let other = &corpus[pick(draws, corpus.len())];
                let from = pick(draws, other.len());
                let to = (from + pick(draws, 256)).min(other.len());
                bytes.splice(at..end, other[from..to].iter().copied());
            }
            9 if end > at => bytes[at..end].reverse(),
            _ => {
                let n = 1 << draws.within(0..12);
                let byte = bytes.get(at).copied().unwrap_or(b' ');
                bytes.splice(at..at, std::iter::repeat_n(byte, n));
            }
        }
    }
    bytes
}

/// Feeds a parser for a while. What it must not do is named with the seed and the input's number.
fn feed(what: &str, corpus: &[Vec<u8>], parse: impl Fn(&[u8])) {
    let mut draws = Draws::new();
    // As it is, each input goes in first.
    corpus.iter().for_each(|input| parse(input));
    let (start, mut n) = (Instant::now(), 0_u64);
    while start.elapsed() < seconds() {
        n += 1;
        let input = mutated(&mut draws, corpus);
        let began = Instant::now();
        let outcome = catch_unwind(AssertUnwindSafe(|| parse(&input)));
        let name = || {
            let file = std::env::temp_dir().join(format!("lorad-fuzz-{what}-{n}"));
            std::fs::write(&file, &input).unwrap();
            format!("{what}: input {n}, kept as {}", file.display())
        };
        assert!(outcome.is_ok(), "{} panicked", name());
        assert!(began.elapsed() < LONGEST, "{} took {:?}", name(), began.elapsed());
    }
    println!("fuzz {what}: {n} inputs, 0 panics, none slower than {LONGEST:?}");
}

/// Takes every picture for one of 8 x 8 pixels: decoders are fuzzed by their authors, and run confined.
struct Blind;

impl Inspector for Blind {
    fn inspect(&self, requests: &[InspectRequest]) -> std::io::Result<Vec<ImageVerdict>> {
        let verdict = |_| ImageVerdict::Ok {
            width: 8,
            height: 8,
            format: "png".to_owned(),
        };
        Ok(requests.iter().map(verdict).collect())
    }
}

fn ingest_bytes(dir: &Path, bytes: &[u8]) {
    let (archive, staging) = (dir.join("archive"), dir.join("staging"));
    std::fs::create_dir_all(&staging).unwrap();
    std::fs::write(&archive, bytes).unwrap();
    let limits = Limits {
        max_entries: 200,
        max_total_bytes: 4 << 20,
        max_file_bytes: 1 << 20,
        ..Limits::default()
    };
    let dest = dir.join("dataset");
    if ingest(Source::Archive(&archive), &staging, &dest, &limits, &Blind).is_ok() {
        std::fs::remove_dir_all(&dest).unwrap();
    }
    // Nothing beside what it was given, and nothing left.
    let mut names: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .flatten()
        .map(|entry| entry.file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["archive", "staging"], "it wrote outside its folder");
    assert_eq!(std::fs::read_dir(staging).unwrap().count(), 0, "staging is not empty");
}

#[test]
fn archives() {
    let dir = tempfile::tempdir().unwrap();
    let extra = tar_entry(b"c.txt", b'0', b"", b"a caption");
    let corpus = [
        zip(&pictures(3)),
        zip(&[
            Entry::new("10_red apple/a.png", b"\x89PNG"),
            Entry::new("reg/b.png", b"x"),
            Entry::new("a.mask.png", b"y"),
        ]),
        tar(std::slice::from_ref(&extra)),
        gz(&tar(&[extra])),
    ];
    feed("archives", &corpus, |bytes| ingest_bytes(dir.path(), bytes));
}

#[test]
fn captions() {
    let dir = tempfile::tempdir().unwrap();
    let corpus: [&[u8]; 4] = [
        b"{\"file_name\": \"a.png\", \"text\": \"red\", \"repeats\": 3}\n{\"file_name\": \"b.png\", \"text\": \"blue\", \"is_reg\": true}\n",
        b"file_name,text,repeats\na.png,\"red, \"\"quoted\"\"\",2\nb.png,blue,1\n",
        b"\xef\xbb\xbfa caption\r\nin two lines\r\n",
        b"{\"file_name\": \"a.png\", \"text\": [\"one\", \"two\"]}\n",
    ];
    let corpus = corpus.map(<[u8]>::to_vec);
    feed("captions", &corpus, |bytes| {
        for name in ["metadata.jsonl", "metadata.csv", "a.txt"] {
            let entries = [
                Entry::new("a.png", b"\x89PNG"),
                Entry::new("b.png", b"\x89PNG"),
                Entry::new(name, bytes),
            ];
            ingest_bytes(dir.path(), &zip(&entries));
        }
    });
}

/// A copy of a small base model, of which one file at a time is mutated.
#[test]
fn base_models() {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny-sd1/model");
    let dir = tempfile::tempdir().unwrap();
    let copy = std::process::Command::new("cp")
        .arg("-r")
        .arg(&from)
        .arg(dir.path())
        .status()
        .unwrap();
    assert!(copy.success());
    let base = dir.path().join("model");
    let mut open = vec![base.clone()];
    let mut files: Vec<PathBuf> = Vec::new();
    while let Some(folder) = open.pop() {
        for entry in std::fs::read_dir(folder).unwrap().flatten() {
            if entry.path().is_dir() {
                open.push(entry.path());
            } else {
                files.push(entry.path());
            }
        }
    }
    files.sort();
    TrainerCatalog.inspect_base(&base).unwrap();
    let corpus: Vec<Vec<u8>> = files.iter().map(|file| std::fs::read(file).unwrap()).collect();
    // The last byte of an input says which file it stands for.
    let tagged: Vec<Vec<u8>> = (0_u8..)
        .zip(&corpus)
        .map(|(n, bytes)| [bytes.as_slice(), &[n]].concat())
        .collect();
    feed("base-models", &tagged, |bytes| {
        let Some((tag, bytes)) = bytes.split_last() else { return };
        let n = usize::from(*tag) % files.len();
        std::fs::write(&files[n], bytes).unwrap();
        let _ = TrainerCatalog.inspect_base(&base);
        std::fs::write(&files[n], &corpus[n]).unwrap();
    });
}

#[test]
fn manifests_settings_and_worker_events() {
    let dir = tempfile::tempdir().unwrap();
    let manifest = json!({"version": 1, "step": 7, "files": {"state.json": {"bytes": 2, "sha256": "00"}}}).to_string();
    feed("manifests", &[manifest.into_bytes()], |bytes| {
        std::fs::write(dir.path().join("state.json"), b"{}").unwrap();
        std::fs::write(dir.path().join("manifest.json"), bytes).unwrap();
        assert_eq!(verified_checkpoint_step(dir.path()), None);
    });
    let file = dir.path().join("lorad.toml");
    feed("settings", &[lorad::config::DEFAULTS.as_bytes().to_vec()], |bytes| {
        std::fs::write(&file, bytes).unwrap();
        let _ = Config::from_layers(Some(&file), std::collections::HashMap::new(), &[]);
    });
    let post = json!({"token": "t", "events": [
        {"seq": 1, "t_ms": 5, "type": "step", "step": 1, "total_steps": 2, "epoch": 0.5, "loss": 1e-3, "lr": 1e-4, "grad_norm": null,
            "step_ms": 2.0, "samples_per_s": 1.0, "extra": {"a": 1.0}},
        {"seq": 2, "t_ms": 6, "type": "log", "level": "info", "message": "x"},
    ]});
    feed("worker-events", &[post.to_string().into_bytes()], |bytes| {
        let _ = serde_json::from_slice::<EventsPost>(bytes);
    });
}

/// Raw requests to a real server: heads, ranges, cursors, multipart, JSON.
#[tokio::test(flavor = "multi_thread")]
async fn requests() {
    let client = Client::start().await;
    let address = client.url("").replace("http://", "");
    let (_, posted) = client.post("/jobs", &demo_job(&client).await).await;
    let id = posted["id"].as_str().unwrap().to_owned();
    client.wait_for(&id, &["succeeded"], Duration::from_secs(120)).await;
    let file = format!("/jobs/{id}/files/receipt.json");
    let body = demo_job(&client).await.to_string();
    let form = "--b\r\nContent-Disposition: form-data; name=\"name\"\r\n\r\nx\r\n--b\r\nContent-Disposition: form-data; \
        name=\"file\"; filename=\"a.zip\"\r\n\r\nPK\x03\x04\r\n--b--\r\n";
    let with_body = |head: &str, body: &str| {
        format!(
            "{head}\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .into_bytes()
    };
    let corpus = [
        with_body(
            &format!("GET {file} HTTP/1.1\r\nRange: bytes=0-5,7-\r\nIf-Range: \"x\""),
            "",
        ),
        with_body(
            &format!("GET /jobs/{id}/events?after=3 HTTP/1.1\r\nLast-Event-ID: 3\r\nAccept: text/event-stream"),
            "",
        ),
        with_body(
            &format!("GET /jobs/{id}/metrics?keys=loss&from=1&to=3&max_points=2 HTTP/1.1"),
            "",
        ),
        with_body("GET /jobs?status=queued&q=a&tag=b&limit=3 HTTP/1.1", ""),
        with_body(
            "POST /jobs?dry_run=true HTTP/1.1\r\nContent-Type: application/json\r\nIdempotency-Key: k",
            &body,
        ),
        with_body(
            "POST /datasets HTTP/1.1\r\nContent-Type: multipart/form-data; boundary=b",
            form,
        ),
        with_body(
            &format!("PATCH /jobs/{id} HTTP/1.1\r\nContent-Type: application/json"),
            "{\"tags\": [\"a\"], \"priority\": 3}",
        ),
    ];
    let mut draws = Draws::new();
    let (start, mut n, mut answered) = (Instant::now(), 0_u64, 0_u64);
    while start.elapsed() < 2 * seconds() {
        n += 1;
        let input = mutated(&mut draws, &corpus);
        let exchange = async {
            let mut stream = tokio::net::TcpStream::connect(&address).await.unwrap();
            // The server may hang up before it has read everything.
            let _ = stream.write_all(&input).await;
            let _ = stream.shutdown().await;
            let mut head = [0; 16];
            let mut taken = 0;
            while taken < head.len() {
                match stream.read(&mut head[taken..]).await {
                    Ok(0) | Err(_) => break,
                    Ok(more) => taken += more,
                }
            }
            head
        };
        let head = tokio::time::timeout(2 * LONGEST, exchange).await;
        let head = head.unwrap_or_else(|_| panic!("request {n} is not answered: {}", String::from_utf8_lossy(&input)));
        answered += u64::from(head.starts_with(b"HTTP/1.1 "));
        assert!(
            head[9] != b'5' || head[9..12] == *b"505" || head[9..12] == *b"503",
            "request {n}: {}\n{}",
            String::from_utf8_lossy(&head),
            String::from_utf8_lossy(&input)
        );
    }
    assert!(answered > n / 4, "{answered} of {n} were answered at all");
    assert_eq!(client.json("/readyz").await["status"], "ok");
    println!("fuzz requests: {n} ({answered} answered), 0 answered with 500");
}
