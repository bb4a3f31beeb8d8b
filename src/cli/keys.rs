//! `lorad keys`: API keys, made and revoked in the data directory itself, so that the first one needs no other. A server may be
//! at work on it; it sees the change with its next request.

use anyhow::{Context, Result, bail, ensure};
use jiff::{Span, Timestamp, ZonedDateTime, civil::Date, tz::TimeZone};
use lorad::{
    app::DataDir,
    domain::{ApiKey, NewApiKey, Quota, now_ms},
    secret::Key,
    store::Store,
};
use serde_json::json;

use super::{
    Exit,
    args::{Keys, KeysCommand, NewKey},
    config, runtime,
    tables::table,
};

pub(crate) fn run(args: &Keys) -> Result<Exit> {
    let settings = match &args.command {
        KeysCommand::Create(new) => &new.settings,
        KeysCommand::List { settings, .. } | KeysCommand::Revoke { settings, .. } => settings,
    };
    let data = DataDir::new(config::load(settings, &[])?.storage.data_dir);
    // The first key may come before the first start; anything else needs keys to be there.
    if matches!(args.command, KeysCommand::Create(_)) {
        std::fs::create_dir_all(data.root()).with_context(|| format!("make {}", data.root().display()))?;
    } else {
        ensure!(
            data.database().is_file(),
            "{} is no data directory: it holds no database",
            data.root().display()
        );
    }
    runtime()?.block_on(async {
        let store = Store::open(&data.database()).await?;
        let done = match &args.command {
            KeysCommand::Create(new) => create(&store, new).await,
            KeysCommand::List { json, .. } => list(&store, *json).await,
            KeysCommand::Revoke { id, .. } => revoke(&store, id).await,
        };
        store.close().await;
        done
    })
}

async fn create(store: &Store, new: &NewKey) -> Result<Exit> {
    let name = new.name.trim();
    ensure!(
        (1..=100).contains(&name.chars().count()) && !name.chars().any(char::is_control),
        "--name must have 1 to 100 characters"
    );
    let expires_at_ms = new.expires.as_deref().map(end).transpose()?;
    let first = !store.has_keys().await?;
    let key = Key::random().context("no random numbers from the system")?;
    let stored = store
        .insert_key(&NewApiKey {
            name: name.to_owned(),
            scope: new.scope,
            prefix: key.prefix().to_owned(),
            sha256: key.sha256(),
            expires_at_ms,
            quota: Quota {
                requests_per_minute: new.requests_per_minute,
                queued_jobs: new.queued_jobs,
                running_jobs: new.running_jobs,
                dataset_bytes: new.dataset_bytes,
            },
        })
        .await?;
    eprintln!("{} ({}, {}); shown only now:", stored.name, stored.scope, stored.id);
    println!("{}", key.reveal());
    if first {
        eprintln!("This is the first key: from now on every request needs one.");
    }
    Ok(Exit::Ok)
}

async fn list(store: &Store, as_json: bool) -> Result<Exit> {
    let keys = store.keys().await?;
    if as_json {
        let rows: Vec<_> = keys.iter().map(describe).collect();
        println!("{}", serde_json::to_string_pretty(&rows)?);
    } else if keys.is_empty() {
        eprintln!("no keys; `lorad keys create --name me --scope admin` makes one");
    } else {
        let rows = keys.iter().map(|key| {
            vec![
                key.id.to_string(),
                key.name.clone(),
                key.scope.to_string(),
                format!("{}…", key.prefix),
                status(key).to_owned(),
                key.last_used_at_ms
                    .map_or("never used".to_owned(), |t| format!("used {}", time(t))),
            ]
        });
        println!("{}", table(&rows.collect::<Vec<_>>()));
    }
    Ok(Exit::Ok)
}

async fn revoke(store: &Store, id: &str) -> Result<Exit> {
    let keys = store.keys().await?;
    let Some(key) = keys.iter().find(|key| key.id.to_string() == id || key.prefix == id) else {
        bail!("there is no key {id}; `lorad keys list` shows them");
    };
    store.revoke_key(key.id, false).await?;
    eprintln!("{} ({}) opens nothing any more", key.name, key.id);
    Ok(Exit::Ok)
}

fn describe(key: &ApiKey) -> serde_json::Value {
    json!({
        "id": key.id, "name": key.name, "scope": key.scope, "prefix": key.prefix, "status": status(key),
        "created_at": time(key.created_at_ms), "expires_at": key.expires_at_ms.map(time),
        "revoked_at": key.revoked_at_ms.map(time), "last_used_at": key.last_used_at_ms.map(time),
    })
}

fn status(key: &ApiKey) -> &'static str {
    match key.revoked_at_ms {
        Some(_) => "revoked",
        None if key.is_valid(now_ms()) => "valid",
        None => "expired",
    }
}

fn time(ms: i64) -> String {
    Timestamp::from_millisecond(ms).map_or_else(|_| ms.to_string(), |t| t.to_string())
}

/// `90d`, `1 year`, `2030-01-31` or `2030-01-31T12:00:00Z`, as milliseconds; must lie ahead.
fn end(text: &str) -> Result<i64> {
    let parsed = if let Ok(time) = text.parse::<Timestamp>() {
        time
    } else if let Ok(date) = text.parse::<Date>() {
        date.to_zoned_datetime(TimeZone::UTC)?.timestamp()
    } else if let Ok(span) = text.parse::<Span>() {
        ZonedDateTime::now().checked_add(span)?.timestamp()
    } else {
        bail!("--expires {text}: write 90d, 2030-01-31 or 2030-01-31T12:00:00Z");
    };
    ensure!(parsed > Timestamp::now(), "--expires {text}: lies in the past");
    Ok(parsed.as_millisecond())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_a_span_a_date_or_a_time_that_lies_ahead() {
        let day = 86_400_000;
        let in_days = (end("90d").unwrap() - now_ms()) / day;
        assert!((89..=90).contains(&in_days), "{in_days}");
        assert_eq!(end("2999-01-31").unwrap(), end("2999-01-31T00:00:00Z").unwrap());
        for bad in ["soon", "", "2001-01-01", "-3d"] {
            assert!(end(bad).is_err(), "{bad}");
        }
    }
}
