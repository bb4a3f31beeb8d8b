//! What kohya's folders, tables and masks become, from a folder on disk to `items.jsonl`.

use std::{fs, io, path::Path};

use lorad_proto::dataset::{ImageVerdict, Item, epoch_samples};

use super::{
    IngestError, Ingested, Limits, Refusal, Source, ingest,
    inspect::{InspectRequest, Inspector},
};

/// Says of every picture that it is as large as its file has bytes.
struct BySize;

impl Inspector for BySize {
    fn inspect(&self, requests: &[InspectRequest]) -> io::Result<Vec<ImageVerdict>> {
        let verdict = |request: &InspectRequest| {
            let side = fs::metadata(&request.file)?.len() as u32;
            Ok(ImageVerdict::Ok {
                width: side,
                height: side,
                format: "png".to_owned(),
            })
        };
        requests.iter().map(verdict).collect()
    }
}

/// Ingests these files; a picture is written as a PNG signature and `content` behind it.
fn ingested(files: &[(&str, &str)]) -> Result<Ingested, IngestError> {
    let dir = tempfile::tempdir().unwrap();
    let (source, staging) = (dir.path().join("source"), dir.path().join("staging"));
    fs::create_dir(&staging).unwrap();
    for (name, content) in files {
        let path = source.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let signature: &[u8] = if Path::new(name).extension().is_some_and(|e| e == "png") {
            b"\x89PNG\r\n\x1a\n"
        } else {
            b""
        };
        fs::write(path, [signature, content.as_bytes()].concat()).unwrap();
    }
    let dest = dir.path().join("dataset");
    let result = ingest(Source::Folder(&source), &staging, &dest, &Limits::default(), &BySize)?;
    for item in &result.items {
        assert!(dest.join("files").join(&item.file).is_file());
        assert!(
            item.mask
                .iter()
                .all(|mask| dest.join("files").join(&mask.file).is_file())
        );
    }
    Ok(result)
}

fn by_source<'a>(result: &'a Ingested, source: &str) -> &'a Item {
    result.items.iter().find(|item| item.source == source).unwrap()
}

fn codes(result: Result<Ingested, IngestError>) -> Vec<String> {
    let Err(IngestError::Refused(refusal)) = result else {
        panic!("{result:?}")
    };
    let Refusal { problem, .. } = *refusal;
    if problem.errors.is_empty() {
        return vec![problem.code];
    }
    problem.errors.into_iter().map(|e| e.code).collect()
}

#[test]
fn kohyas_folders_say_how_often_what_and_what_for() {
    let result = ingested(&[
        ("set/img/10_red apple/a.png", "1"),
        ("set/img/10_red apple/b.png", "2"),
        ("set/img/10_red apple/b.txt", "an apple on a table"),
        ("set/img/plain_folder/c.png", "3"),
        ("set/img/plain_folder/c.caption", "a pear"),
        ("set/reg/1_fruit/d.png", "4"),
    ])
    .unwrap();
    let item = |name: &str| {
        let item = by_source(&result, name);
        (item.repeats, item.is_reg, item.caption.as_str())
    };
    assert_eq!(item("set/img/10_red apple/a.png"), (10, false, "red apple"));
    assert_eq!(item("set/img/10_red apple/b.png"), (10, false, "an apple on a table"));
    assert_eq!(item("set/img/plain_folder/c.png"), (1, false, "a pear"));
    assert_eq!(item("set/reg/1_fruit/d.png"), (1, true, "fruit"));
    assert_eq!((result.report.n_samples, result.report.n_reg), (42, 1));
    assert_eq!(
        epoch_samples(&result.items).len(),
        42,
        "21 pictures and as many for regularisation"
    );
}

#[test]
fn a_table_overrides_the_folder() {
    let result = ingested(&[
        (
            "metadata.jsonl",
            "{\"file_name\":\"3_x/a.png\",\"text\":\"a\",\"repeats\":2}\n{\"file_name\":\"3_x/b.png\",\"text\":\"b\"}\n\
             {\"file_name\":\"c.png\",\"text\":\"c\",\"is_reg\":true}",
        ),
        ("3_x/a.png", "1"),
        ("3_x/b.png", "2"),
        ("c.png", "3"),
    ])
    .unwrap();
    let repeats: Vec<u32> = result.items.iter().map(|item| item.repeats).collect();
    assert_eq!(repeats, [2, 3, 1]);
    assert!(result.items[2].is_reg);
}

#[test]
fn masks_lie_beside_their_pictures_or_in_a_folder_of_their_own() {
    let result = ingested(&[
        ("x/a.png", "1"),
        ("x/a.txt", "a"),
        ("x/a.mask.png", "2"),
        ("x/b.png", "3"),
        ("x/b.txt", "b"),
        ("x/masks/b.png", "4"),
        ("x/c.png", "5"),
        ("x/c.txt", "c"),
    ])
    .unwrap();
    assert_eq!(result.items.len(), 3);
    let masks: Vec<Option<&str>> = result
        .items
        .iter()
        .map(|item| item.mask.as_ref().map(|mask| mask.file.as_str()))
        .collect();
    assert_eq!(masks, [Some("00000.mask.png"), Some("00001.mask.png"), None]);
}

#[test]
fn what_means_nothing_is_refused_by_name() {
    assert_eq!(codes(ingested(&[("0_x/a.png", "1")])), ["folder.bad_repeats"]);
    assert_eq!(codes(ingested(&[("99999999999_x/a.png", "1")])), ["folder.bad_repeats"]);
    assert_eq!(
        codes(ingested(&[("1_x/a.png", "1"), ("1_x/b.mask.png", "1")])),
        ["mask.no_image"]
    );
    assert_eq!(
        codes(ingested(&[
            ("1_x/a.png", "1"),
            ("1_x/a.mask.png", "1"),
            ("1_x/masks/a.png", "1")
        ])),
        ["mask.two_masks"]
    );
    assert_eq!(
        codes(ingested(&[("1_x/a.png", "1"), ("1_x/a.mask.png", "22")])),
        ["mask.wrong_size"]
    );
    assert_eq!(
        codes(ingested(&[("reg/1_x/a.png", "1")])),
        ["dataset.only_regularisation"]
    );
}
