//! What the data settings do to a whole run: buckets, captions, repeats, masks.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
#[path = "support/attempt.rs"]
mod attempt;
#[allow(dead_code)]
mod support;

use std::{fs, path::Path};

use attempt::{Picture, Recorder, run, spec, train, write_dataset, write_items};
use lorad_proto::{
    dataset::{Item, Mask},
    event::{StopReason, WorkerEvent},
    spec::Cache,
};
use lorad_train::families;
use serde_json::{Value, json};
use support::base_folder;

/// A run over `pictures`, changed by `edit`, with these settings: the adapter, and what it reported.
fn trained(
    root: &Path,
    pictures: &[Picture],
    edit: impl FnOnce(&mut Vec<Item>, &Path),
    given: &Value,
    cache: Option<&Path>,
) -> (Vec<u8>, Recorder) {
    let dir = tempfile::tempdir_in(root).unwrap().keep();
    let data = dir.join("data");
    let mut items = write_dataset(&data, pictures);
    edit(&mut items, &data);
    write_items(&data, &items);
    let mut job = spec("tiny-sd1", &data, dir.join("attempt"), &settings(given));
    job.cache = Cache {
        dir: cache.map(Path::to_owned),
        max_bytes: 1 << 30,
    };
    let log = Recorder::default();
    (train(&job, &log), log)
}

fn unchanged(_: &mut Vec<Item>, _: &Path) {}

/// Entries found and entries computed, as the run said.
fn cache_counts(log: &Recorder) -> (u64, u64) {
    let events = log.events.lock().unwrap();
    let line = events.iter().find_map(|event| match event {
        WorkerEvent::Log { message, .. } => message.strip_prefix("cache: "),
        _ => None,
    });
    let numbers: Vec<u64> = line.unwrap().split(' ').filter_map(|word| word.parse().ok()).collect();
    (numbers[0], numbers[1])
}

/// Three aspect ratios, several pictures of each.
const MIXED: &[Picture] = &[
    (64, 64, "icon of thing 0"),
    (96, 64, "icon of thing 1"),
    (64, 96, "icon of thing 2"),
    (64, 64, "icon of thing 3"),
    (97, 61, "icon of thing 4"),
    (60, 130, "icon of thing 5"),
    (70, 70, "icon of thing 6"),
];
const SQUARE: &[Picture] = &[(64, 64, "a"), (64, 64, "b"), (80, 80, "c")];

fn settings(changes: &Value) -> Value {
    let mut given = json!({
        "lora_rank": 2, "learning_rate": 1e-2, "max_train_steps": 6, "batch_size": 2, "gradient_accumulation_steps": 2,
        "seed": 3, "resolution": 32,
    });
    for (key, value) in changes.as_object().unwrap() {
        given[key] = value.clone();
    }
    given
}

#[test]
fn a_run_over_buckets_continues_to_the_byte_identical_adapter() {
    let root = tempfile::tempdir().unwrap();
    let data = root.path().join("data");
    write_dataset(&data, MIXED);
    let job = |name: &str| spec("tiny-sd1", &data, root.path().join(name), &settings(&json!({})));
    let log = Recorder::default();
    let expected = train(&job("straight"), &log);
    // Windows of four over seven samples: step 3 is in the middle of an epoch.
    for pause in [1, 3] {
        let first = job(&format!("first-{pause}"));
        let first_log = Recorder {
            pause_after: Some(pause),
            ..Recorder::default()
        };
        let end = run(&first, &first_log);
        assert!(
            matches!(end, WorkerEvent::Stopped { step, reason: StopReason::Paused, .. } if step == pause),
            "{end:?}"
        );
        let mut second = job(&format!("second-{pause}"));
        second.resume_from = Some(first.attempt_dir.join(format!("checkpoints/{pause:08}")));
        let second_log = Recorder::default();
        assert!(train(&second, &second_log) == expected, "paused after step {pause}");
        assert_eq!([first_log.losses(), second_log.losses()].concat(), log.losses());
    }
}

#[test]
fn buckets_change_nothing_for_square_pictures_and_something_for_others() {
    let root = tempfile::tempdir().unwrap();
    for (name, pictures, same) in [("square", SQUARE, true), ("mixed", MIXED, false)] {
        let data = root.path().join(name);
        write_dataset(&data, pictures);
        let adapter = |on: bool| {
            let dir = root.path().join(format!("{name}-{on}"));
            let given = settings(&json!({"enable_bucket": on, "center_crop": true}));
            train(&spec("tiny-sd1", &data, dir, &given), &Recorder::default())
        };
        assert_eq!(adapter(true) == adapter(false), same, "{name}");
    }
}

#[test]
fn how_the_window_is_cut_changes_nothing_but_rounding() {
    let root = tempfile::tempdir().unwrap();
    let data = root.path().join("data");
    write_dataset(&data, MIXED);
    let losses = |batch: u64, accumulation: u64| {
        let dir = root.path().join(format!("{batch}x{accumulation}"));
        let given = settings(&json!({"batch_size": batch, "gradient_accumulation_steps": accumulation}));
        let log = Recorder::default();
        train(&spec("tiny-sd1", &data, dir, &given), &log);
        log.losses()
    };
    for ((step, one), (_, other)) in losses(4, 1).into_iter().zip(losses(1, 4)) {
        assert!((one - other).abs() < 1e-4 * one, "step {step}: {one} and {other}");
    }
}

/// Every data setting changes the adapter, given what it needs to have an effect.
#[test]
fn no_data_setting_is_decoration() {
    let root = tempfile::tempdir().unwrap();
    let data = root.path().join("data");
    let mut items = write_dataset(&data, MIXED);
    items[1].caption = "red, round, small thing, left".to_owned();
    items[2].is_reg = true;
    add_mask(&mut items[3], &data);
    write_items(&data, &items);
    let none = json!({});
    let shuffled = json!({"shuffle_caption": true});
    let resolution = 32;
    let changes: Vec<(&str, &Value, Value)> = vec![
        ("enable_bucket", &none, json!(false)),
        ("min_bucket_reso", &none, json!(resolution)),
        ("max_bucket_reso", &none, json!(resolution)),
        ("bucket_reso_steps", &none, json!(resolution)),
        ("bucket_no_upscale", &none, json!(true)),
        ("caption_prefix", &none, json!("a photo of")),
        ("caption_suffix", &none, json!("on a table")),
        ("trigger_word", &none, json!("ohwx")),
        ("shuffle_caption", &none, json!(true)),
        ("keep_tokens", &shuffled, json!(1)),
        ("caption_separator", &shuffled, json!(" ")),
        ("masked_loss", &none, json!(true)),
        ("prior_loss_weight", &none, json!(0.5)),
    ];
    let mut count = 0;
    let mut adapter = |given: &Value| {
        count += 1;
        let dir = root.path().join(format!("run-{count}"));
        train(&spec("tiny-sd1", &data, dir, &settings(given)), &Recorder::default())
    };
    let mut same = Vec::new();
    for (name, needs, value) in &changes {
        let mut after = (*needs).clone();
        after[*name] = value.clone();
        if adapter(needs) == adapter(&after) {
            same.push(*name);
        }
    }
    assert!(same.is_empty(), "these changed nothing: {same:?}");
    for field in lorad_train::data::FIELDS {
        assert!(
            changes.iter().any(|(name, ..)| *name == field.name),
            "{} is not covered",
            field.name
        );
    }
}

/// White on the left, black on the right.
fn add_mask(item: &mut Item, data: &Path) {
    let mask = image::GrayImage::from_fn(item.width, item.height, |x, _| {
        image::Luma([if x < item.width / 2 { 255 } else { 0 }])
    });
    let file = format!("{:05}.mask.png", item.n);
    mask.save(data.join("files").join(&file)).unwrap();
    item.mask = Some(Mask {
        file,
        sha256: "0".repeat(64),
    });
}

#[test]
fn a_mask_that_is_white_everywhere_and_a_weight_of_one_change_nothing() {
    let root = tempfile::tempdir().unwrap();
    let masked = json!({"masked_loss": true});
    let plain = trained(root.path(), SQUARE, unchanged, &json!({}), None).0;
    assert!(trained(root.path(), SQUARE, unchanged, &masked, None).0 == plain);
    let white = |items: &mut Vec<Item>, data: &Path| {
        add_mask(&mut items[0], data);
        let all = image::GrayImage::from_pixel(items[0].width, items[0].height, image::Luma([255]));
        all.save(data.join("files/00000.mask.png")).unwrap();
    };
    let first = |log: &Recorder| log.losses()[0].1;
    let (_, white) = trained(root.path(), SQUARE, white, &masked, None);
    let (_, none) = trained(root.path(), SQUARE, unchanged, &masked, None);
    assert!((first(&white) - first(&none)).abs() < 1e-6);
}

#[test]
fn repeats_and_regularisation_images_are_drawn_and_weighed() {
    let root = tempfile::tempdir().unwrap();
    let epochs = json!({"max_train_steps": null, "num_epochs": 1, "gradient_accumulation_steps": 1, "batch_size": 1});
    let edit = |items: &mut Vec<Item>, _: &Path| {
        items[0].repeats = 4;
        items[2].is_reg = true;
    };
    let (_, log) = trained(root.path(), SQUARE, edit, &epochs, None);
    assert_eq!(log.losses().len(), 10, "four and one, and five for regularisation");
    // So slow that the losses differ by their weights only.
    let losses = |weight: f64| {
        let mut given = epochs.clone();
        given["learning_rate"] = json!(1e-12);
        given["prior_loss_weight"] = json!(weight);
        trained(root.path(), SQUARE, edit, &given, None).1.losses()
    };
    let ratios = losses(0.25).into_iter().zip(losses(1.0)).map(|((_, a), (_, b))| a / b);
    let (light, full): (Vec<f64>, Vec<f64>) = ratios.partition(|ratio| *ratio < 0.5);
    assert_eq!((light.len(), full.len()), (5, 5));
    assert!(light.iter().all(|r| (r - 0.25).abs() < 1e-4) && full.iter().all(|r| (r - 1.0).abs() < 1e-4));
}

#[test]
fn a_run_with_shuffled_captions_does_not_depend_on_where_it_was_interrupted() {
    let root = tempfile::tempdir().unwrap();
    let data = root.path().join("data");
    write_dataset(
        &data,
        &[(64, 64, "a, b, c, d"), (64, 64, "e, f, g, h"), (64, 64, "i, j, k")],
    );
    let job = |name: &str| {
        let given = settings(&json!({"shuffle_caption": true, "keep_tokens": 1}));
        spec("tiny-sd1", &data, root.path().join(name), &given)
    };
    let expected = train(&job("straight"), &Recorder::default());
    let first = job("first");
    let pausing = Recorder {
        pause_after: Some(2),
        ..Recorder::default()
    };
    run(&first, &pausing);
    let mut second = job("second");
    second.resume_from = Some(first.attempt_dir.join("checkpoints/00000002"));
    assert!(train(&second, &Recorder::default()) == expected);
}

#[test]
fn the_second_job_finds_everything_in_the_cache_and_trains_the_same() {
    let root = tempfile::tempdir().unwrap();
    let cache = root.path().join("cache");
    let given = json!({"random_flip": true, "caption_dropout": 0.2});
    let without = trained(root.path(), MIXED, unchanged, &given, None).0;
    let (cold, first) = trained(root.path(), MIXED, unchanged, &given, Some(&cache));
    let (warm, second) = trained(root.path(), MIXED, unchanged, &given, Some(&cache));
    assert!(cold == without && warm == without, "the cache changes no bit");
    let ((found, made), again) = (cache_counts(&first), cache_counts(&second));
    assert_eq!(found, 0);
    assert_eq!(again, (made, 0));
}

/// Every change of what an entry depends on makes another entry: nothing stale is found.
#[test]
fn a_changed_picture_cut_size_or_caption_never_hits_an_entry_of_before() {
    let root = tempfile::tempdir().unwrap();
    let cache = root.path().join("cache");
    let pictures: &[Picture] = &[(90, 64, "a thing")];
    let one = json!({"center_crop": true, "enable_bucket": false, "max_train_steps": 1, "resolution": 16});
    let computed = |given: &Value, edit: &dyn Fn(&mut Vec<Item>, &Path)| {
        let mut all = one.clone();
        for (key, value) in given.as_object().unwrap() {
            all[key] = value.clone();
        }
        let (_, log) = trained(
            root.path(),
            pictures,
            |items, data| edit(items, data),
            &all,
            Some(&cache),
        );
        cache_counts(&log).1
    };
    let same: &dyn Fn(&mut Vec<Item>, &Path) = &|_, _| {};
    assert_eq!(computed(&json!({}), same), 2, "a picture and a text");
    assert_eq!(computed(&json!({}), same), 0);
    // The mirror image is new, the picture itself is not.
    assert_eq!(computed(&json!({"random_flip": true}), same), 1);
    // Four random cuts; one of them may not be the centre.
    assert_eq!(computed(&json!({"center_crop": false}), same), 4);
    assert_eq!(computed(&json!({"center_crop": false, "seed": 4}), same), 4);
    assert_eq!(computed(&json!({"resolution": 32}), same), 1);
    assert_eq!(computed(&json!({"resolution": 32, "enable_bucket": true}), same), 1);
    // In that bucket the picture is cut like a square one.
    assert_eq!(computed(&json!({"enable_bucket": true}), same), 0);
    assert_eq!(computed(&json!({"trigger_word": "ohwx"}), same), 1);
    let repainted: &dyn Fn(&mut Vec<Item>, &Path) = &|items, data| {
        // The same name and size, one pixel different; what the item says of it is not trusted.
        let path = data.join("files").join(&items[0].file);
        let mut picture = image::open(&path).unwrap().into_rgb8();
        picture.put_pixel(40, 40, image::Rgb([1, 2, 3]));
        picture.save(path).unwrap();
    };
    assert_eq!(computed(&json!({}), repainted), 1);
    assert_eq!(computed(&json!({}), same), 0, "and the first is still there");
}

#[test]
fn another_encoder_never_hits_an_entry_of_before() {
    let root = tempfile::tempdir().unwrap();
    let cache = root.path().join("cache");
    let data = root.path().join("data");
    write_dataset(&data, SQUARE);
    let base = root.path().join("base");
    for entry in walkdir::WalkDir::new(base_folder("tiny-sd1")) {
        let entry = entry.unwrap();
        let to = base.join(entry.path().strip_prefix(base_folder("tiny-sd1")).unwrap());
        if entry.file_type().is_dir() {
            fs::create_dir_all(to).unwrap();
        } else {
            fs::copy(entry.path(), to).unwrap();
        }
    }
    let mut n = 0;
    let mut computed = || {
        n += 1;
        let mut job = spec(
            "tiny-sd1",
            &data,
            root.path().join(format!("run-{n}")),
            &settings(&json!({"max_train_steps": 1})),
        );
        job.base_model.path = base.clone();
        job.cache = Cache {
            dir: Some(cache.clone()),
            max_bytes: 1 << 30,
        };
        let log = Recorder::default();
        train(&job, &log);
        cache_counts(&log).1
    };
    assert_eq!((computed(), computed()), (6, 0));
    // The last byte of the file is the last value of some tensor.
    for (part, expected) in [("vae/diffusion_pytorch_model", 3), ("text_encoder/model", 3)] {
        let path = base.join(format!("{part}.safetensors"));
        let mut bytes = fs::read(&path).unwrap();
        let at = bytes.len() - 2;
        bytes[at] ^= 1;
        fs::write(&path, bytes).unwrap();
        assert_eq!(computed(), expected, "{part}");
    }
    let config = base.join("vae/config.json");
    let text = fs::read_to_string(&config)
        .unwrap()
        .replace("\"sample_size\": 16", "\"sample_size\": 32");
    fs::write(&config, text).unwrap();
    assert_eq!(computed(), 3, "a config that changed");
}

#[test]
fn the_planned_steps_are_those_of_the_run_with_repeats_regularisation_images_and_held_out_items() {
    let root = tempfile::tempdir().unwrap();
    let data = root.path().join("data");
    let mut items = write_dataset(&data, MIXED);
    for item in &mut items {
        item.repeats = 1 + item.n % 4;
    }
    // Fewer than the others with their repeats, so that they come again and again.
    items[2].is_reg = true;
    write_items(&data, &items);
    for given in [
        json!({"max_train_steps": null, "num_epochs": 2, "batch_size": 2, "validation_fraction": 0.4}),
        json!({"max_train_steps": null, "num_epochs": 3, "batch_size": 1, "gradient_accumulation_steps": 2}),
        json!({"max_train_steps": 3, "batch_size": 2, "validation_fraction": 0.4}),
    ] {
        let dir = tempfile::tempdir_in(root.path()).unwrap().keep();
        let job = spec("tiny-sd1", &data, dir.join("attempt"), &settings(&given));
        let base = &job.base_model.path;
        let plan = families::by_id("sd1")
            .unwrap()
            .plan(
                base,
                &families::inspect_base(base).unwrap(),
                &job.hyperparameters,
                &job.sampling,
                &data,
            )
            .unwrap();
        let log = Recorder::default();
        train(&job, &log);
        assert_eq!(log.losses().len() as u64, plan.total_steps, "{given}");
    }
}

/// Gives every picture a mask that is black everywhere, but for one.
fn black(but: Option<u32>) -> impl FnOnce(&mut Vec<Item>, &Path) {
    move |items, data| {
        for item in items.iter_mut().filter(|item| but.is_none_or(|n| item.n != n)) {
            let file = format!("{:05}.mask.png", item.n);
            let path = data.join("files").join(&file);
            image::GrayImage::new(item.width, item.height).save(&path).unwrap();
            item.mask = Some(Mask {
                file,
                sha256: "0".repeat(64),
            });
        }
    }
}

/// kohya's masks say where the loss counts; one that is black everywhere says nowhere.
#[test]
fn pictures_with_black_masks_neither_stop_the_gradient_check_nor_hide_from_it() {
    let root = tempfile::tempdir().unwrap();
    let given = json!({"masked_loss": true, "batch_size": 1, "max_train_steps": 8});
    // Whatever comes first, most of it is black: the check finds the one picture that shows something.
    let (_, log) = trained(root.path(), MIXED, black(Some(0)), &given, None);
    assert!(
        log.said("gradient check") && log.alerts().is_empty(),
        "{:?}",
        log.alerts()
    );
    let (_, log) = trained(root.path(), MIXED, black(None), &given, None);
    assert!(!log.said("gradient check"));
    assert_eq!(log.alerts(), ["gradients.not_checked"]);
    assert!(log.losses().iter().all(|(_, loss)| *loss == 0.0));
}

/// Gradients of zeros, before an optimizer has seen others: a moment of 0 divided by the root of one.
#[test]
fn a_first_step_in_which_nothing_counts_breaks_no_optimizer() {
    let root = tempfile::tempdir().unwrap();
    for optimizer in ["adamw", "lion", "adafactor", "prodigy", "sgd"] {
        let given = json!({"masked_loss": true, "batch_size": 1, "gradient_accumulation_steps": 1, "max_train_steps": 7,
            "optimizer": optimizer});
        let (adapter, log) = trained(root.path(), MIXED, black(Some(0)), &given, None);
        let losses = log.losses();
        let counting: Vec<u64> = losses
            .iter()
            .filter(|(_, loss)| *loss > 0.0)
            .map(|(step, _)| *step)
            .collect();
        // An epoch: the one picture that counts comes once, and not first.
        assert!(counting.len() == 1 && counting[0] > 1, "{optimizer}: {losses:?}");
        assert!(log.alerts().is_empty(), "{optimizer}: {:?}", log.alerts());
        let (nothing, _) = trained(root.path(), MIXED, black(None), &given, None);
        assert!(
            adapter != nothing,
            "{optimizer} learned nothing from the one that counts"
        );
        let file = safetensors::SafeTensors::deserialize(&adapter).unwrap();
        let values = file.tensors().into_iter().flat_map(|(_, t)| t.data().to_vec());
        let values: Vec<u8> = values.collect();
        assert!(
            values.as_chunks().0.iter().all(|v| f32::from_le_bytes(*v).is_finite()),
            "{optimizer}"
        );
    }
}

#[test]
fn a_steps_losses_by_quarter_of_the_schedule_make_up_its_loss() {
    let root = tempfile::tempdir().unwrap();
    let given = json!({"batch_size": 2, "gradient_accumulation_steps": 2, "max_train_steps": 6});
    let (_, log) = trained(root.path(), MIXED, unchanged, &given, None);
    let mut seen = [false; 4];
    for event in log.events.lock().unwrap().iter() {
        let WorkerEvent::Step(step) = event else { continue };
        let bins: Vec<f64> = (0..4)
            .filter_map(|bin| {
                let loss = step.extra.get(&format!("loss_bin_{bin}")).copied();
                seen[bin] |= loss.is_some();
                loss
            })
            .collect();
        let loss = step.loss.unwrap();
        let (least, most) = bins
            .iter()
            .fold((f64::MAX, 0.0_f64), |(a, b), v| (a.min(*v), b.max(*v)));
        assert!(
            least <= loss * 1.0001 && loss <= most * 1.0001,
            "step {}: {loss} of {bins:?}",
            step.step
        );
    }
    assert_eq!(seen, [true; 4], "six steps of four samples meet every quarter");
    // With samples of one quarter only, its loss is the loss.
    let given = json!({"max_timestep": 250, "max_train_steps": 2});
    let (_, log) = trained(root.path(), MIXED, unchanged, &given, None);
    for event in log.events.lock().unwrap().iter() {
        let WorkerEvent::Step(step) = event else { continue };
        let (loss, bin) = (step.loss.unwrap(), step.extra["loss_bin_0"]);
        assert!((loss / bin - 1.0).abs() < 1e-5, "{loss} {bin}");
        assert!(!step.extra.contains_key("loss_bin_1"));
    }
}
