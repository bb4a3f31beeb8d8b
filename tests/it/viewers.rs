//! Many viewers of one job: slow ones, ones that come back, all at once after a restart, and with cursors of their own making.
//! `LORAD_TEST_VIEWERS` makes them more.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::StreamExt as _;
use lorad::domain::JobId;
use serde_json::json;

use crate::{
    recovery::prepared,
    scripted::{self, let_go},
    server::{PATIENCE, ServerProcess, settings, wait},
};

/// Viewers in the quick form; a fifth of them are slow.
const VIEWERS: usize = 200;
/// Events with a log line of [`LINE_BYTES`] each.
const STEPS: u64 = 160;
const LINE_BYTES: u64 = 16 << 10;
/// What a viewer that takes nothing may hold on the server: one page of events, as rows and as text, and the connection's
/// buffers. Its whole history is several times that.
const BYTES_PER_SLOW_VIEWER: u64 = 1 << 20;

fn viewers() -> usize {
    std::env::var("LORAD_TEST_VIEWERS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(VIEWERS)
}

/// What all viewers share.
struct Watch {
    job: JobId,
    /// Changes when the server is restarted.
    address: std::sync::Mutex<String>,
    http: reqwest::Client,
    connects: AtomicUsize,
    slow_may_read: AtomicBool,
    /// Slow viewers that are connected to the second server.
    slow_at_second: AtomicUsize,
    is_second: AtomicBool,
}

/// Follows the job to its end, coming back whenever the stream breaks off or every `leave_after` events; each event must
/// have the number after the one before. How many there were.
async fn view(watch: Arc<Watch>, is_slow: bool, leave_after: usize) -> u64 {
    let (mut cursor, start) = (0_u64, Instant::now());
    loop {
        assert!(
            start.elapsed() < 4 * PATIENCE,
            "a viewer at {cursor} does not come to the end"
        );
        let address = watch.address.lock().unwrap().clone();
        let request = watch.http.get(format!("http://{address}/jobs/{}/events", watch.job));
        let response = request.header("last-event-id", cursor).send().await;
        let Ok(response) = response else {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        watch.connects.fetch_add(1, Ordering::Relaxed);
        match response.status().as_u16() {
            200 => {}
            204 => return cursor,
            503 => {
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
            other => panic!("a viewer got {other}"),
        }
        if is_slow {
            let is_second = watch.is_second.load(Ordering::Relaxed);
            watch
                .slow_at_second
                .fetch_add(usize::from(is_second), Ordering::Relaxed);
            // It takes nothing; the first server's end is the end of that.
            while !watch.slow_may_read.load(Ordering::Relaxed) && watch.is_second.load(Ordering::Relaxed) == is_second {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        let (mut body, mut rest, mut n) = (response.bytes_stream(), Vec::new(), 0);
        while let Some(Ok(chunk)) = body.next().await {
            rest.extend_from_slice(&chunk);
            // Whole lines only: an event that broke off was not seen.
            let mut whole = 0;
            while let Some(end) = rest[whole..].windows(2).position(|pair| pair == b"\n\n") {
                let block = &rest[whole..whole + end];
                let id = block
                    .split(|byte| *byte == b'\n')
                    .find_map(|line| line.strip_prefix(b"id: "))
                    .map(|id| std::str::from_utf8(id).unwrap().parse::<u64>().unwrap());
                if let Some(id) = id {
                    assert_eq!(id, cursor + 1, "a gap or a double");
                    cursor = id;
                    n += 1;
                }
                whole += end + 2;
            }
            rest.drain(..whole);
            if n >= leave_after {
                break;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_viewers_slow_ones_and_a_storm_after_a_restart_see_each_event_once_and_the_server_buffers_little() {
    let n_viewers = viewers();
    scripted::raise_open_files();
    let dir = tempfile::tempdir().unwrap();
    let script = json!({"steps": STEPS, "step_ms": 1, "hold_at": STEPS / 2, "log_bytes": LINE_BYTES});
    let (store, job) = prepared(dir.path(), script).await;
    let max_streams = (2 * n_viewers).to_string();
    let settings = settings(dir.path(), &[("server.max_streams", &max_streams)]);
    let first = ServerProcess::start(dir.path(), &settings).await;
    let before = scripted::stats(dir.path()).await.heap_bytes;
    let watch = Arc::new(Watch {
        job: job.id,
        address: first.address.clone().into(),
        http: reqwest::Client::builder().no_proxy().build().unwrap(),
        connects: AtomicUsize::new(0),
        slow_may_read: AtomicBool::new(false),
        slow_at_second: AtomicUsize::new(0),
        is_second: AtomicBool::new(false),
    });
    // Every fifth is slow; some stay, some come back again and again.
    let start_viewer = |n: usize, is_slow| {
        let leave_after = if n.is_multiple_of(3) { 40 } else { usize::MAX };
        tokio::spawn(view(watch.clone(), is_slow, leave_after))
    };
    let n_slow = n_viewers / 5;
    let slow: Vec<_> = (0..n_slow).map(|n| start_viewer(n, true)).collect();
    let fast: Vec<_> = (n_slow..n_viewers).map(|n| start_viewer(n, false)).collect();
    wait(&store, job.id, "the middle", |job| job.step == STEPS / 2).await;
    let start = Instant::now();
    while watch.connects.load(Ordering::Relaxed) < n_viewers {
        assert!(start.elapsed() < 2 * PATIENCE, "not every viewer is let in");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // All of them are connected; the slow ones have taken nothing. Now the server goes, and everyone comes back at once.
    first.kill();
    let second = ServerProcess::start(dir.path(), &settings).await;
    *watch.address.lock().unwrap() = second.address.clone();
    watch.is_second.store(true, Ordering::Relaxed);
    let start = Instant::now();
    while watch.slow_at_second.load(Ordering::Relaxed) < n_slow {
        assert!(start.elapsed() < 2 * PATIENCE, "not every viewer comes back");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let_go(&store.attempt(job.id, 1).await.unwrap().dir);
    let done = wait(&store, job.id, "the end", |job| job.status.is_final()).await;
    for viewer in fast {
        assert_eq!(viewer.await.unwrap(), done.last_seq, "a viewer missed the end");
    }
    // Only those are left that took nothing, and the whole history waits for each.
    let held = scripted::stats(dir.path()).await.heap_bytes.saturating_sub(before);
    let allowed = BYTES_PER_SLOW_VIEWER * n_slow as u64 + (8 << 20);
    assert!(
        held <= allowed,
        "{n_slow} slow viewers hold {held} bytes of the server's heap, {allowed} are allowed"
    );
    assert!(
        allowed < n_slow as u64 * STEPS * LINE_BYTES,
        "the bound would hold without a bound"
    );
    watch.slow_may_read.store(true, Ordering::Relaxed);
    for viewer in slow {
        assert_eq!(viewer.await.unwrap(), done.last_seq, "a slow viewer missed something");
    }
    println!(
        "viewers: {n_viewers} ({n_slow} that took nothing before the end), {} connections, one server restart, {} events each: 0 \
         gaps, 0 doubles; a slow one holds {} KiB of the server's heap, its history has {} KiB",
        watch.connects.load(Ordering::Relaxed),
        done.last_seq,
        held / 1024 / n_slow as u64,
        STEPS * LINE_BYTES / 1024
    );
    second.kill();
}

#[tokio::test(flavor = "multi_thread")]
async fn no_cursor_that_a_viewer_makes_up_breaks_a_stream() {
    let dir = tempfile::tempdir().unwrap();
    let (store, job) = prepared(dir.path(), json!({"steps": 5, "step_ms": 1})).await;
    let server = ServerProcess::start(dir.path(), &settings(dir.path(), &[])).await;
    wait(&store, job.id, "the end", |job| job.status.is_final()).await;
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let url = format!("http://{}/jobs/{}/events", server.address, job.id);
    let long = "9".repeat(3000);
    let cursors: [&[u8]; 12] = [
        b"",
        b" ",
        b"-1",
        b"1e3",
        b"0x10",
        b"18446744073709551615",
        b"18446744073709551616",
        long.as_bytes(),
        b"1,2",
        b"1\t2",
        b"\xff\xfe",
        b"'; DROP TABLE jobs; --",
    ];
    for cursor in cursors {
        let value = reqwest::header::HeaderValue::from_bytes(cursor).unwrap();
        let response = http.get(&url).header("last-event-id", value).send().await.unwrap();
        let (status, text) = (response.status(), response.text().await.unwrap());
        // It starts anew, and is told so.
        assert!(
            status == 200 && text.contains("event: resync"),
            "{cursor:?}: {status} {text}"
        );
    }
    for query in [
        "after=x",
        "after=-1",
        "after=",
        "after=1&after=2",
        "before=3",
        "after=1e3",
    ] {
        let status = http.get(format!("{url}?{query}")).send().await.unwrap().status();
        assert_eq!(status, 400, "{query}");
    }
    println!(
        "bad cursors: {} in a header, 6 in a query: answered, none with 5xx",
        cursors.len()
    );
    server.kill();
}
