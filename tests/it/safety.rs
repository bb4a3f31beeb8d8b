//! Hostile and broken input: each a clear answer that names file and field, all errors at once, nothing left behind.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::{
    client::{Client, demo_job},
    corpus::{self, Entry, gz, pictures, png, tar, tar_entry, with_good, zip},
};

/// What must come of an upload: status, and the codes with the entries that they name.
struct Expect {
    what: &'static str,
    archive: Vec<u8>,
    status: u16,
    code: &'static str,
    entries: Vec<(&'static str, &'static str)>,
}

fn refused(what: &'static str, archive: Vec<u8>, entries: &[(&'static str, &'static str)]) -> Expect {
    Expect {
        what,
        archive,
        status: 422,
        code: "dataset.refused",
        entries: entries.to_vec(),
    }
}

fn whole(what: &'static str, archive: Vec<u8>, status: u16, code: &'static str) -> Expect {
    Expect {
        what,
        archive,
        status,
        code,
        entries: Vec::new(),
    }
}

async fn check_all(client: &Client, cases: Vec<Expect>) {
    let before = client.everything().await;
    for case in cases {
        let started = Instant::now();
        let (status, body) = client.upload("hostile", case.archive).await;
        let took = started.elapsed();
        assert_eq!(
            (status, body["code"].as_str()),
            (case.status, Some(case.code)),
            "{}: {body:#}",
            case.what
        );
        for (code, entry) in &case.entries {
            let named = body["errors"].as_array().unwrap().iter().any(|e| {
                e["code"] == *code
                    && e["detail"].as_str().unwrap().contains(entry)
                    && e["pointer"].as_str().unwrap().starts_with("/file/")
            });
            assert!(named, "{}: {code} for {entry} is not in {body:#}", case.what);
        }
        if !case.entries.is_empty() {
            let found = body["errors"].as_array().unwrap().len();
            assert_eq!(found, case.entries.len(), "{}: {body:#}", case.what);
        }
        assert!(
            body["request_id"].as_str().unwrap().starts_with("req_"),
            "{}",
            case.what
        );
        assert!(!body["hint"].as_str().unwrap().is_empty(), "{}", case.what);
        assert!(took < Duration::from_secs(5), "{} took {took:?}", case.what);
    }
    assert_eq!(client.everything().await, before, "something was left behind");
}

fn at(mode: u32) -> impl FnOnce(&mut Entry) {
    move |entry| entry.unix_mode = Some(mode)
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_escape_or_confuse_are_refused_with_every_entry_named() {
    let client = Client::start().await;
    let one = |name: &str| with_good([Entry::new(name, "x")]);
    check_all(
        &client,
        vec![
            refused("..", one("../evil.txt"), &[("entry.path_traversal", "../evil.txt")]),
            refused(
                "inner ..",
                one("a/../../evil.txt"),
                &[("entry.path_traversal", "evil.txt")],
            ),
            refused(
                "absolute",
                one("/etc/evil.txt"),
                &[("entry.absolute_path", "/etc/evil.txt")],
            ),
            refused("drive", one("C:/evil.txt"), &[("entry.absolute_path", "C:/evil.txt")]),
            refused(
                "backslash",
                one("..\\evil.txt"),
                &[("entry.backslash_in_name", "evil.txt")],
            ),
            refused("NUL", one("evil\0.txt"), &[("entry.nul_in_name", "evil")]),
            refused("line break", one("e\nvil.txt"), &[("entry.control_in_name", "vil.txt")]),
            refused("long", one(&"x".repeat(300)), &[("entry.name_too_long", "xxx")]),
            refused("device", one("aux.txt"), &[("entry.device_name", "aux.txt")]),
            refused("twice", one("p0.txt"), &[("entry.duplicate_name", "p0.txt")]),
            refused("case", one("P0.TXT"), &[("entry.duplicate_name", "P0.TXT")]),
            refused(
                "unicode",
                with_good([Entry::new("\u{e9}.txt", "x"), Entry::new("e\u{301}.txt", "x")]),
                &[("entry.duplicate_name", "e\u{301}.txt")],
            ),
            refused(
                "four at once",
                with_good([
                    Entry::new("../a.txt", "x"),
                    Entry::new("/b.txt", "x"),
                    Entry::new("link", "/etc/passwd").with(at(0o120_777)),
                    Entry::new("secret.txt", "x").with(|e| e.flags |= 1),
                ]),
                &[
                    ("entry.path_traversal", "../a.txt"),
                    ("entry.absolute_path", "/b.txt"),
                    ("entry.symlink", "link"),
                    ("entry.encrypted", "secret.txt"),
                ],
            ),
        ],
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn links_devices_bombs_and_damaged_zips_are_refused() {
    let client = Client::start_with(&[
        ("limits.archive_entries", "200"),
        ("limits.archive_unpacked_bytes", "50000000"),
    ])
    .await;
    let zeros = vec![0u8; 12 << 20];
    let good = with_good([]);
    let cut = |n: usize| good[..good.len() - n].to_vec();
    let mut junk_after = good.clone();
    junk_after.extend(b"junk");
    let mut junk_before = b"junk".to_vec();
    junk_before.extend(&good);
    let mut flipped = good.clone();
    flipped[60] ^= 0xff; // inside the first entry's data
    let many: Vec<Entry> = (0..201).map(|i| Entry::new(format!("{i}.txt"), "x")).collect();
    let large: Vec<Entry> = (0..6)
        .map(|i| Entry::new(format!("{i}.txt"), noise(10 << 20)).with(|e| e.deflate = false))
        .collect();
    check_all(
        &client,
        vec![
            refused(
                "symlink",
                with_good([Entry::new("l.txt", "/etc/passwd").with(at(0o120_777))]),
                &[("entry.symlink", "l.txt")],
            ),
            refused(
                "fifo",
                with_good([Entry::new("f.txt", "").with(at(0o010_644))]),
                &[("entry.special_file", "f.txt")],
            ),
            refused(
                "nested",
                with_good([Entry::new("in.zip", zip(&pictures(1)))]),
                &[("entry.nested_archive", "in.zip")],
            ),
            refused(
                "disguised",
                with_good([Entry::new("p9.png", gz(b"x"))]),
                &[("entry.nested_archive", "p9.png")],
            ),
            refused(
                "bomb",
                with_good([Entry::new("z.txt", &zeros)]),
                &[("entry.bomb", "z.txt")],
            ),
            refused(
                "bomb that lies",
                with_good([Entry::new("z.txt", &zeros).with(|e| e.declared = Some(100))]),
                &[("entry.size_mismatch", "z.txt")],
            ),
            refused(
                "declares more",
                with_good([Entry::new("z.txt", "abc").with(|e| e.declared = Some(1000))]),
                &[("entry.size_mismatch", "z.txt")],
            ),
            refused(
                "checksum",
                with_good([Entry::new("z.txt", "abc").with(|e| e.crc = Some(1))]),
                &[("entry.damaged", "z.txt")],
            ),
            refused(
                "method",
                with_good([Entry::new("z.txt", "abc").with(|e| e.method = Some(12))]),
                &[("entry.unsupported_compression", "z.txt")],
            ),
            refused(
                "overlap",
                with_good([Entry::new("p0.png", "x").with(|e| {
                    e.shares = Some(0);
                    e.name = b"again.png".to_vec();
                })]),
                // Its two headers name it differently, which is what sharing bytes looks like from there.
                &[("entry.name_mismatch", "again.png")],
            ),
            refused(
                "two names",
                with_good([Entry::new("a.txt", "x").with(|e| e.local_name = Some(b"b.txt".to_vec()))]),
                &[("entry.name_mismatch", "a.txt")],
            ),
            refused("bit flip", flipped, &[("entry.damaged", "p0.png")]),
            whole("cut", cut(1), 422, "dataset.damaged"),
            whole("cut half", cut(good.len() / 2), 422, "dataset.damaged"),
            whole("junk after", junk_after, 422, "dataset.damaged"),
            whole("junk before", junk_before, 415, "dataset.not_an_archive"),
            whole("many", zip(&many), 413, "dataset.too_many_entries"),
            whole("large", zip(&large), 413, "dataset.too_large"),
            whole("empty zip", zip(&[]), 422, "dataset.empty"),
            whole(
                "only a notice",
                zip(&[Entry::new("README.md", "hi")]),
                422,
                "dataset.empty",
            ),
            whole("empty", Vec::new(), 415, "dataset.not_an_archive"),
            whole("a picture", png(8, 8), 415, "dataset.not_an_archive"),
            whole("a page", b"<!doctype html><p>".to_vec(), 415, "dataset.not_an_archive"),
            whole("7z", b"7z\xbc\xaf\x27\x1c".to_vec(), 415, "dataset.not_an_archive"),
        ],
    )
    .await;
}

/// Bytes that do not compress.
fn noise(n: usize) -> Vec<u8> {
    let mut x = 0x9e37_79b9_7f4a_7c15_u64;
    std::iter::repeat_with(|| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x.to_le_bytes()
    })
    .flatten()
    .take(n)
    .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_tars_are_refused() {
    let client = Client::start().await;
    let one = |name: &[u8], kind: u8, link: &[u8]| tar(&[tar_entry(name, kind, link, b"")]);
    let good = gz(&tar(&[]));
    let sparse = [
        corpus::pax_record("GNU.sparse.major", "1"),
        tar_entry(b"s.txt", b'0', b"", b"x"),
    ]
    .concat();
    let long = [
        corpus::pax_path("../../evil.txt"),
        tar_entry(b"fine.txt", b'0', b"", b"x"),
    ]
    .concat();
    check_all(
        &client,
        vec![
            refused(
                "..",
                one(b"../evil.txt", b'0', b""),
                &[("entry.path_traversal", "../evil.txt")],
            ),
            refused(
                "absolute",
                one(b"/evil.txt", b'0', b""),
                &[("entry.absolute_path", "/evil.txt")],
            ),
            refused(
                "symlink",
                one(b"l.txt", b'2', b"/etc/passwd"),
                &[("entry.symlink", "l.txt")],
            ),
            refused(
                "hard link",
                one(b"h.txt", b'1', b"/etc/passwd"),
                &[("entry.hardlink", "h.txt")],
            ),
            refused("device", one(b"d.txt", b'3', b""), &[("entry.special_file", "d.txt")]),
            refused("pax path", gz(&tar(&[long])), &[("entry.path_traversal", "evil.txt")]),
            refused(
                "twice",
                one(b"p0.txt", b'0', b""),
                &[("entry.duplicate_name", "p0.txt")],
            ),
            whole("sparse", tar(&[sparse]), 422, "dataset.damaged"),
            whole(
                "huge name",
                tar(&[tar_entry(b"n", b'L', b"", &vec![b'a'; 70_000])]),
                422,
                "dataset.damaged",
            ),
            whole("cut gzip", good[..good.len() - 9].to_vec(), 422, "dataset.damaged"),
            whole("cut tar", tar(&[])[..1500].to_vec(), 422, "dataset.damaged"),
            whole("gzip of a text", gz(b"hello"), 422, "dataset.damaged"),
            whole(
                "gzip bomb",
                gz(&tar(&[tar_entry(b"z.txt", b'0', b"", &vec![0; 30 << 20])])),
                422,
                "dataset.bomb",
            ),
        ],
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_pictures_and_captions_without_partners_are_all_named_at_once() {
    let client = Client::start().await;
    let cut = png(64, 64)[..60].to_vec();
    let caption = |name: &str| Entry::new(name, "a caption");
    let mut good = png(16, 16);
    good.extend(b"<script>alert(1)</script>"); // harmless: the file is never served, its thumbnail is drawn anew
    check_all(
        &client,
        vec![
            refused(
                "everything at once",
                with_good([
                    Entry::new("bomb.png", corpus::png_bomb()),
                    caption("bomb.txt"),
                    Entry::new("cut.png", cut),
                    caption("cut.txt"),
                    Entry::new("empty.png", ""),
                    caption("empty.txt"),
                    Entry::new("page.png", "<html><script>alert(1)</script>"),
                    caption("page.txt"),
                    Entry::new("draw.svg", "<svg xmlns='http://www.w3.org/2000/svg'/>"),
                    Entry::new("anim.gif", "GIF89a......"),
                    Entry::new("movie.mp4", "\0\0\0\x18ftypisom"),
                    Entry::new("alone.png", png(16, 16)),
                    caption("orphan.txt"),
                    Entry::new("latin.png", png(17, 16)),
                    Entry::new("latin.txt", b"caf\xe9"),
                    Entry::new("blank.png", png(18, 16)),
                    Entry::new("blank.txt", " \n"),
                ]),
                &[
                    ("image.too_large", "bomb.png"),
                    ("image.truncated", "cut.png"),
                    ("image.empty", "empty.png"),
                    ("image.unsupported_format", "page.png"),
                    ("image.unsupported_format", "draw.svg"),
                    ("image.unsupported_format", "anim.gif"),
                    ("file.unsupported", "movie.mp4"),
                    ("image.no_caption", "alone.png"),
                    ("caption.no_image", "orphan.txt"),
                    ("caption.not_utf8", "latin.txt"),
                    ("caption.empty", "blank.txt"),
                ],
            ),
            refused(
                "table",
                zip(&[
                    Entry::new("a.png", png(16, 16)),
                    Entry::new("b.png", png(17, 16)),
                    Entry::new("b.txt", "two captions"),
                    Entry::new("c.png", png(18, 16)),
                    Entry::new(
                        "metadata.jsonl",
                        "{\"file_name\":\"a.png\",\"text\":\"a\"}\n{\"file_name\":\"b.png\",\"text\":\"b\"}\n{\"file_name\":\"gone.png\",\"text\":\"x\"}\n{\"file_name\":\"../a.png\",\"text\":\"x\"}\nnonsense",
                    ),
                ]),
                &[
                    ("caption.two_captions", "b.txt"),
                    ("image.no_caption", "c.png"),
                    ("metadata.no_image", "gone.png"),
                    ("metadata.bad_row", "line 4"),
                    ("metadata.bad_row", "line 5"),
                ],
            ),
        ],
    )
    .await;
    let (status, body) = client
        .upload("polyglot", zip(&[Entry::new("a.png", good), caption("a.txt")]))
        .await;
    assert_eq!(status, 201, "{body:#}");
    let thumbnail = client
        .get_bytes(&format!("/datasets/{}/items/0/thumbnail", body["id"].as_str().unwrap()))
        .await;
    assert!(thumbnail.starts_with(b"\x89PNG") && !thumbnail.windows(8).any(|w| w == b"<script>"));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_fault_of_a_job_is_found_at_once_under_its_pointer() {
    let client = Client::start().await;
    let before = client.everything().await;
    let request = json!({
        "name": "a\u{7}b",
        "base_model": "no-such-base",
        "dataset_id": "ds_00000000000000000000000000000000",
        "sampling": {"seed": -1, "num_inference_steps": 0, "guidance_scale": "high", "prompts": [3], "nonsense": 1},
        "export": {"merged_pipeline": "yes"},
        "priority": 5000,
        "tags": "x",
        "unknown": true,
    });
    let (status, body) = client.post("/jobs", &request).await;
    assert_eq!(status, 422, "{body:#}");
    let mut pointers: Vec<&str> = body["errors"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| e["pointer"].as_str().unwrap())
        .collect();
    pointers.sort_unstable();
    assert_eq!(
        pointers,
        [
            "/base_model",
            "/dataset_id",
            "/export/merged_pipeline",
            "/name",
            "/priority",
            "/sampling/guidance_scale",
            "/sampling/nonsense",
            "/sampling/num_inference_steps",
            "/sampling/prompts/0",
            "/sampling/seed",
            "/tags",
            "/unknown",
        ]
    );
    assert_eq!(client.everything().await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn hyperparameters_out_of_range_of_a_wrong_type_or_unknown_are_all_named() {
    let client = Client::start().await;
    let mut request = demo_job(&client).await;
    request["hyperparameters"] = json!({
        "learning_rate": -1.0,
        "lora_rank": 0,
        "batch_size": 0,
        "max_train_steps": "many",
        "lora_dropout": 2.0,
        "seed": -5,
        "learning_rat": 1e-4,
    });
    let (status, body) = client.post("/jobs", &request).await;
    assert_eq!(status, 422, "{body:#}");
    let pointers: Vec<&str> = body["errors"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| e["pointer"].as_str().unwrap())
        .collect();
    for field in [
        "learning_rate",
        "lora_rank",
        "batch_size",
        "max_train_steps",
        "lora_dropout",
        "seed",
        "learning_rat",
    ] {
        let pointer = format!("/hyperparameters/{field}");
        assert!(pointers.contains(&pointer.as_str()), "{pointer} is not in {body:#}");
    }
    // JSON has no NaN and no infinity: the text itself is refused, with its position.
    for (text, found) in [("NaN", "line 1"), ("1e999", "out of range"), ("-Infinity", "line 1")] {
        let body = format!("{{\"name\":\"x\",\"hyperparameters\":{{\"learning_rate\":{text}}}}}");
        let (status, answer) = client.post_text("/jobs", "application/json", body).await;
        assert_eq!(
            (status, answer["code"].as_str()),
            (400, Some("json.malformed")),
            "{text}: {answer:#}"
        );
        assert!(answer["detail"].as_str().unwrap().contains(found), "{text}: {answer:#}");
    }
    assert_eq!(client.json("/jobs").await["data"], json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_with_a_bad_archive_and_bad_fields_hears_of_both_and_leaves_nothing() {
    let client = Client::start().await;
    let before = client.everything().await;
    let job = json!({"name": "", "base_model": "demo-icons", "hyperparameters": {"lora_rank": -3}}).to_string();
    let archive = with_good([Entry::new("../evil.txt", "x")]);
    let (status, body) = client.submit_form(&job, archive).await;
    assert_eq!(status, 422, "{body:#}");
    let pointers: Vec<&str> = body["errors"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| e["pointer"].as_str().unwrap())
        .collect();
    for pointer in ["/dataset/..~1evil.txt", "/name", "/hyperparameters/lora_rank"] {
        assert!(pointers.contains(&pointer), "{pointer} is not in {body:#}");
    }
    let (status, _) = client.submit_form(&job, with_good([])).await;
    assert_eq!(status, 422, "a good archive with a bad job");
    assert_eq!(client.everything().await, before);
}

/// A copy of the bundled base, to be broken.
fn copy_of_base(client: &Client, name: &str) -> std::path::PathBuf {
    let to = client.roots().join(name);
    copy_dir(
        &std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo-icons"),
        &to,
    );
    to
}

fn copy_dir(from: &std::path::Path, to: &std::path::Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &to.join(entry.file_name()));
        } else {
            std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_base_that_does_not_fit_is_refused_by_file_and_key_and_paths_stay_inside_the_roots() {
    let client = Client::start().await;
    let register =
        async |id: &str, path: &std::path::Path| client.post("/models", &json!({"id": id, "path": path})).await;

    let good = copy_of_base(&client, "good");
    let (status, body) = register("good", &good).await;
    assert_eq!(status, 201, "{body:#}");
    let (status, body) = register("good", &good).await;
    assert_eq!((status, body["code"].as_str()), (409, Some("resource.exists")));

    let wide = copy_of_base(&client, "wide");
    let config = wide.join("unet/config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(
        &config,
        text.replace("\"cross_attention_dim\": 128", "\"cross_attention_dim\": 256"),
    )
    .unwrap();
    let (status, body) = register("wide", &wide).await;
    assert_eq!(status, 422, "{body:#}");
    let said = body.to_string().to_lowercase();
    assert!(
        said.contains("unet") && (said.contains("attn2") || said.contains("cross_attention_dim")),
        "{body:#}"
    );

    let cut = copy_of_base(&client, "cut");
    let weights = cut.join("unet/diffusion_pytorch_model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
    let (status, body) = register("cut", &cut).await;
    assert_eq!(status, 422, "{body:#}");
    assert!(
        body.to_string().contains("diffusion_pytorch_model.safetensors"),
        "{body:#}"
    );

    let pickle = copy_of_base(&client, "pickle");
    std::fs::remove_file(pickle.join("unet/diffusion_pytorch_model.safetensors")).unwrap();
    std::fs::write(pickle.join("unet/diffusion_pytorch_model.bin"), b"PK\x03\x04pickle").unwrap();
    let (status, body) = register("pickle", &pickle).await;
    assert_eq!(status, 422, "{body:#}");

    for outside in ["/etc", "/", "/no/such/folder"] {
        let (status, body) = register("outside", std::path::Path::new(outside)).await;
        assert_eq!(
            (status, body["code"].as_str()),
            (403, Some("model.path_not_allowed")),
            "{outside}"
        );
    }
    let link = client.roots().join("link");
    std::os::unix::fs::symlink("/etc", &link).unwrap();
    assert_eq!(register("link", &link).await.0, 403);
    let (status, body) = client
        .post("/models", &json!({"id": "../x", "path": "relative", "y": 1}))
        .await;
    assert_eq!((status, body["errors"].as_array().unwrap().len()), (422, 3), "{body:#}");
    let ids: Vec<Value> = client.json("/models").await["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| m["id"].clone())
        .collect();
    assert_eq!(ids, ["demo-icons", "good"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn other_sites_and_unknown_hosts_cannot_drive_the_server() {
    let client = Client::start().await;
    let request = async |headers: &[(&str, &str)]| {
        let mut request = client.http.post(client.url("/jobs?dry_run=true")).body("{}");
        request = request.header("content-type", "application/json");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = request.send().await.unwrap();
        let status = response.status().as_u16();
        (
            status,
            response.json::<Value>().await.unwrap()["code"]
                .as_str()
                .unwrap()
                .to_owned(),
        )
    };
    let own = client.url("");
    assert_eq!(request(&[]).await.0, 422);
    assert_eq!(
        request(&[("origin", &own), ("sec-fetch-site", "same-origin")]).await.0,
        422
    );
    let forbidden = (403, "origin.not_allowed".to_owned());
    assert_eq!(request(&[("origin", "https://evil.example")]).await, forbidden);
    assert_eq!(request(&[("origin", "null")]).await, forbidden);
    assert_eq!(request(&[("sec-fetch-site", "cross-site")]).await, forbidden);
    assert_eq!(request(&[("sec-fetch-site", "same-site")]).await, forbidden);
    assert_eq!(
        request(&[("host", "evil.example")]).await,
        (403, "host.not_allowed".to_owned())
    );
    for media in ["text/plain", "application/x-www-form-urlencoded", "multipart/mixed", ""] {
        let (status, body) = client.post_text("/jobs", media, "{}".to_owned()).await;
        assert_eq!((status, body["code"].as_str()), (415, Some("json.required")), "{media}");
    }
    // Reading is refused to pages too, but a link may open the dashboard.
    let read = async |path: &str, headers: &[(&str, &str)]| {
        let mut request = client.http.get(client.url(path));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.send().await.unwrap().status().as_u16()
    };
    for site in ["cross-site", "same-site"] {
        for (mode, dest) in [
            ("cors", "empty"),
            ("no-cors", "image"),
            ("navigate", "iframe"),
            ("", ""),
        ] {
            let headers = [
                ("sec-fetch-site", site),
                ("sec-fetch-mode", mode),
                ("sec-fetch-dest", dest),
            ];
            assert_eq!(read("/jobs", &headers).await, 403, "{headers:?}");
            assert_eq!(read("/", &headers).await, 403, "{headers:?}");
        }
        let link = [
            ("sec-fetch-site", site),
            ("sec-fetch-mode", "navigate"),
            ("sec-fetch-dest", "document"),
        ];
        assert_eq!(read("/", &link).await, 200);
    }
    assert_eq!(read("/jobs", &[("origin", "https://evil.example")]).await, 403);
    assert_eq!(
        read("/jobs", &[("origin", &own), ("sec-fetch-site", "same-origin")]).await,
        200
    );
    assert_eq!(
        read("/jobs", &[("sec-fetch-site", "none")]).await,
        200,
        "typed into the address bar"
    );
    let page = client.http.get(client.url("/")).send().await.unwrap();
    assert_eq!(page.headers()["x-content-type-options"], "nosniff");
    let csp = page.headers()["content-security-policy"].to_str().unwrap();
    assert!(
        csp.contains("default-src 'self'") && csp.contains("frame-ancestors 'none'") && !csp.contains("unsafe"),
        "{csp}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_public_name_of_a_proxy_is_a_host_and_an_origin_once_it_is_configured() {
    let client = Client::start_with(&[("server.allowed_hosts", "lora.example.org")]).await;
    let post = async |host: &str, origin: &str| {
        let mut request = client.http.post(client.url("/jobs?dry_run=true")).json(&json!({}));
        if !host.is_empty() {
            request = request.header("host", host);
        }
        request.header("origin", origin).send().await.unwrap().status().as_u16()
    };
    // Whether the proxy keeps the Host that the browser named, or puts its own.
    assert_eq!(post("lora.example.org", "https://lora.example.org").await, 422);
    assert_eq!(post("", "https://lora.example.org").await, 422);
    assert_eq!(post("LORA.example.org:443", "https://lora.example.org").await, 422);
    assert_eq!(post("lora.example.org", "https://evil.example").await, 403);
    assert_eq!(post("evil.example", "https://lora.example.org").await, 403);
    assert_eq!(post("", "https://lora.example.org.evil.example").await, 403);
}

#[tokio::test(flavor = "multi_thread")]
async fn odd_addresses_find_nothing_and_break_nothing() {
    let client = Client::start().await;
    let job = "job_00000000000000000000000000000000";
    for path in [
        "/jobs/..%2f..%2fetc%2fpasswd".to_owned(),
        "/jobs/%00".to_owned(),
        format!("/jobs/{job}"),
        format!("/jobs/{job}/files/..%2f..%2florad.sqlite3"),
        format!("/jobs/{job}/files/%2e%2e"),
        format!("/jobs/{}", "x".repeat(4000)),
        "/datasets/ds_x/items/..%2f/thumbnail".to_owned(),
        "/models/..%2f..".to_owned(),
        "/..%2f..%2fetc/passwd".to_owned(),
        "/js/%2e%2e/%2e%2e/Cargo.toml".to_owned(),
        "/.git/config".to_owned(),
        "//etc/passwd".to_owned(),
    ] {
        let response = client.http.get(client.url(&path)).send().await.unwrap();
        assert_eq!(response.status(), 404, "{path}");
        assert_eq!(response.headers()["content-type"], "application/problem+json", "{path}");
        assert!(response.json::<Value>().await.unwrap()["code"].is_string(), "{path}");
    }
    let response = client.http.get(client.url("/jobs/%ff")).send().await.unwrap();
    assert!(response.status().is_client_error());
    assert_eq!(response.headers()["content-type"], "application/problem+json");
}
