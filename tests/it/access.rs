//! Who may do what: every route with every kind of key, keys that do not open, sessions, and when a server locks itself.

use std::os::unix::fs::PermissionsExt as _;

use lorad::{
    config::Config,
    domain::{KeyId, NewApiKey, Quota, Scope},
    secret::Key,
    serve::{ServeError, serve},
};
use reqwest::{Method, StatusCode, header::HeaderMap};
use serde_json::{Value, json};

use crate::client::Client;

/// Makes a key in the server's database.
async fn key(client: &Client, scope: Scope, expires_at_ms: Option<i64>) -> Key {
    key_with(client, scope, expires_at_ms, Quota::default()).await
}

pub async fn key_with(client: &Client, scope: Scope, expires_at_ms: Option<i64>, quota: Quota) -> Key {
    let key = Key::random().unwrap();
    let new = NewApiKey {
        name: format!("{scope} key"),
        scope,
        prefix: key.prefix().to_owned(),
        sha256: key.sha256(),
        expires_at_ms,
        quota,
    };
    client.store().insert_key(&new).await.unwrap();
    key
}

/// Its id in the server's database.
async fn id_of(client: &Client, key: &Key) -> KeyId {
    client.store().key_by_prefix(key.prefix()).await.unwrap().unwrap().0.id
}

/// One request; `authorization` is left out when empty.
async fn ask(client: &Client, method: &Method, path: &str, authorization: &str) -> (StatusCode, HeaderMap, Value) {
    let mut request = client.http.request(method.clone(), client.url(path));
    if !authorization.is_empty() {
        request = request.header("authorization", authorization);
    }
    let response = request.send().await.unwrap();
    let (status, headers) = (response.status(), response.headers().clone());
    (status, headers, response.json().await.unwrap_or(Value::Null))
}

pub fn bearer(key: &Key) -> String {
    format!("Bearer {}", key.reveal())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_route_asks_for_the_scope_that_the_document_names_and_no_more() {
    let client = Client::start().await;
    let mut keys = Vec::new();
    for scope in Scope::ALL {
        keys.push((*scope, key(&client, *scope, None).await));
    }
    let document = ask(&client, &Method::GET, "/openapi.json", &bearer(&keys[0].1)).await.2;
    let mut walked = std::collections::BTreeMap::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        let address = path
            .replace("/jobs/{id}", "/jobs/job_00000000000000000000000000000000")
            .replace("/datasets/{id}", "/datasets/ds_00000000000000000000000000000000")
            .replace(['{', '}'], "");
        for (method, operation) in item.as_object().unwrap() {
            let method: Method = method.to_uppercase().parse().unwrap();
            let what = format!("{method} {path}");
            let needs = match operation["security"].as_array().unwrap().as_slice() {
                [] => None,
                [bearer, session] => {
                    assert_eq!(bearer["api_key"], session["session"], "{what}");
                    Some(Scope::parse(bearer["api_key"][0].as_str().unwrap()).unwrap())
                }
                other => panic!("{what}: {other:?}"),
            };
            let (status, headers, body) = ask(&client, &method, &address, "").await;
            if needs.is_none() {
                assert_ne!(status, 401, "{what}");
                assert_ne!(status, 403, "{what}");
            } else {
                assert_eq!(status, 401, "{what} without a key");
                assert!(
                    headers["www-authenticate"].to_str().unwrap().starts_with("Bearer"),
                    "{what}"
                );
                assert!(
                    method == Method::HEAD || body["code"] == "auth.required",
                    "{what}: {body}"
                );
            }
            for (scope, key) in &keys {
                let (status, _, body) = ask(&client, &method, &address, &bearer(key)).await;
                if needs.is_none_or(|needs| scope.covers(needs)) {
                    assert_ne!(status, 401, "{what} with {scope}");
                    assert_ne!(status, 403, "{what} with {scope}: {body}");
                } else {
                    assert_eq!(status, 403, "{what} with {scope}");
                    assert!(method == Method::HEAD || body["code"] == "auth.scope", "{what}: {body}");
                }
            }
            walked.insert(what, needs);
        }
    }
    assert!(walked.len() > 45, "{} operations", walked.len());
    // The table itself, where it matters most.
    for (what, needs) in [
        ("GET /livez", None),
        ("POST /session", None),
        ("GET /jobs", Some(Scope::Read)),
        ("GET /version", Some(Scope::Read)),
        ("POST /jobs", Some(Scope::Submit)),
        ("DELETE /datasets/{id}", Some(Scope::Submit)),
        ("POST /models", Some(Scope::Admin)),
        ("GET /api-keys", Some(Scope::Admin)),
    ] {
        assert_eq!(walked[what], needs, "{what}");
    }
    // What no document lists.
    assert_eq!(ask(&client, &Method::GET, "/openapi.json", "").await.0, 401);
    for public in ["/", "/js/main.js", "/css/base.css"] {
        assert_eq!(ask(&client, &Method::GET, public, "").await.0, 200, "{public}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_valid_key_opens_nothing() {
    let client = Client::start().await;
    let good = key(&client, Scope::Admin, None).await;
    let expired = key(&client, Scope::Admin, Some(lorad::domain::now_ms() - 1)).await;
    let other = Key::random().unwrap();
    // The characters that find a row, with another secret and a right checksum.
    let body = format!("{}{}", good.prefix(), &other.reveal()[14..78]);
    let forged = format!("{body}{}", &lorad::secret::sha256_hex(&body)[..8]);
    assert!(Key::parse(&forged).is_some(), "the forgery is well spelt");
    let revoked = key(&client, Scope::Admin, None).await;
    let id = id_of(&client, &revoked).await;
    assert_eq!(ask(&client, &Method::GET, "/jobs", &bearer(&revoked)).await.0, 200);
    client.store().revoke_key(id, true).await.unwrap();
    for (what, authorization) in [
        ("unknown", bearer(&other)),
        ("forged", format!("Bearer {forged}")),
        ("expired", bearer(&expired)),
        ("revoked", bearer(&revoked)),
        ("cut", bearer(&good)[..60].to_owned()),
        ("basic", "Basic YWRtaW46YWRtaW4=".to_owned()),
        ("bare", good.reveal().to_owned()),
        ("empty", "Bearer ".to_owned()),
    ] {
        let (status, headers, body) = ask(&client, &Method::GET, "/jobs", &authorization).await;
        assert_eq!(
            (status.as_u16(), &body["code"]),
            (401, &json!("auth.invalid")),
            "{what}: {body}"
        );
        assert!(
            headers["www-authenticate"].to_str().unwrap().contains("invalid_token"),
            "{what}"
        );
        assert!(
            !body.to_string().contains(&good.reveal()[20..40]),
            "{what} tells a secret"
        );
    }
    let in_address = format!("/jobs?key={}", good.reveal());
    assert_eq!(ask(&client, &Method::GET, &in_address, "").await.0, 401);
    assert_eq!(ask(&client, &Method::GET, "/jobs", &bearer(&good)).await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_key_locks_the_server_is_shown_once_and_kept_only_as_a_hash() {
    let mut client = Client::start().await;
    assert_eq!(client.json("/session").await, json!({"locked": false, "key": null}));
    let new = |name: &str, scope: &str| json!({"name": name, "scope": scope});
    let (status, body) = client.post("/api-keys", &new("too small", "submit")).await;
    assert_eq!(
        (status, &body["errors"][0]["pointer"]),
        (422, &json!("/scope")),
        "{body}"
    );
    let (status, body) = client
        .post(
            "/api-keys",
            &json!({"name": "", "scope": "root", "expires_at": "1999-01-01T00:00:00Z", "quota": {"jobs": 1}}),
        )
        .await;
    assert_eq!((status, body["errors"].as_array().unwrap().len()), (422, 4), "{body}");
    let (status, made) = client.post("/api-keys", &new("me", "admin")).await;
    assert_eq!(status, 201, "{made}");
    let text = made["key"].as_str().unwrap();
    assert_eq!(ask(&client, &Method::GET, "/jobs", "").await.0, 401, "locked at once");
    client.use_key(text);
    let id = made["id"].as_str().unwrap();
    let read = client.json(&format!("/api-keys/{id}")).await;
    assert!(read.get("key").is_none() && read["last_used_at"].is_string(), "{read}");
    assert_eq!(client.json("/session").await["key"]["name"], "me");

    let (status, ci) = client
        .post("/api-keys", &json!({"name": "ci", "scope": "submit", "expires_at": "2999-01-01T00:00:00Z", "quota": {"queued_jobs": 3}}))
        .await;
    assert_eq!((status, &ci["quota"]["queued_jobs"]), (201, &json!(3)), "{ci}");
    let ci_at = format!("/api-keys/{}", ci["id"].as_str().unwrap());
    let patch = client
        .http
        .patch(client.url(&ci_at))
        .json(&json!({"name": "ci 2", "quota": {"running_jobs": 1}}));
    let patched: Value = patch.send().await.unwrap().json().await.unwrap();
    assert_eq!(patched["name"], "ci 2");
    assert_eq!(
        patched["quota"],
        json!({"requests_per_minute": null, "queued_jobs": null, "running_jobs": 1, "dataset_bytes": null})
    );
    assert_eq!(client.json("/api-keys").await["data"].as_array().unwrap().len(), 2);

    // The last admin key stays, over HTTP; and the lock outlives every key.
    let revoke = async |path: &str| {
        client
            .http
            .delete(client.url(path))
            .send()
            .await
            .unwrap()
            .status()
            .as_u16()
    };
    assert_eq!(revoke(&format!("/api-keys/{id}")).await, 409);
    assert_eq!(revoke(&ci_at).await, 204);
    client.store().revoke_key(id.parse().unwrap(), false).await.unwrap();
    client.restart().await;
    assert_eq!(ask(&client, &Method::GET, "/jobs", "").await.0, 401);

    // What is stored is the owner's alone, and is not the key.
    for name in ["lorad.sqlite3", "lorad.sqlite3-wal"] {
        let mode = std::fs::metadata(client.data().join(name))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
    client.stop().await;
    let secret = &text.as_bytes()[14..];
    for file in std::fs::read_dir(client.data()).unwrap() {
        let path = file.unwrap().path();
        if path.is_file() {
            let bytes = std::fs::read(&path).unwrap();
            assert!(
                !bytes.windows(secret.len()).any(|w| w == secret),
                "{} holds the key",
                path.display()
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_browser_signs_in_for_a_cookie_that_reads_streams_downloads_and_ends() {
    let client = Client::start().await;
    let submit = key(&client, Scope::Submit, None).await;
    let login = async |text: &str| {
        client
            .http
            .post(client.url("/session"))
            .json(&json!({"key": text}))
            .send()
            .await
            .unwrap()
    };
    assert_eq!(login("lorad_nonsense").await.status(), 401);
    let response = login(&format!(" {} ", submit.reveal())).await;
    assert_eq!(response.status(), 201);
    let set = response.headers()["set-cookie"].to_str().unwrap().to_owned();
    for flag in ["HttpOnly", "SameSite=Strict", "Path=/", "Max-Age=604800"] {
        assert!(set.contains(flag), "{flag} is missing in {set}");
    }
    assert!(!set.contains("Secure") && !set.contains(submit.reveal()), "{set}");
    let cookie = set.split(';').next().unwrap().to_owned();
    let behind_tls = client
        .http
        .post(client.url("/session"))
        .header("x-forwarded-proto", "https");
    let behind_tls = behind_tls.json(&json!({"key": submit.reveal()})).send().await.unwrap();
    assert!(
        behind_tls.headers()["set-cookie"]
            .to_str()
            .unwrap()
            .ends_with("; Secure")
    );

    let own = client.url("");
    let with = |method: Method, path: &str, origin: &str| {
        let mut request = client.http.request(method, client.url(path)).header("cookie", &cookie);
        if !origin.is_empty() {
            request = request.header("origin", origin);
        }
        request
    };
    let me: Value = with(Method::GET, "/session", "")
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    assert_eq!((&me["locked"], &me["key"]["scope"]), (&json!(true), &json!("submit")));
    let job: Value = with(Method::GET, "/demo", "")
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    let mut job = job;
    job["hyperparameters"]["max_train_steps"] = json!(2);
    job["sampling"] = json!({"prompts": []});
    assert_eq!(
        with(Method::POST, "/jobs", "")
            .json(&job)
            .send()
            .await
            .unwrap()
            .status(),
        403,
        "no origin"
    );
    assert_eq!(
        with(Method::POST, "/jobs", "https://evil.example")
            .json(&job)
            .send()
            .await
            .unwrap()
            .status(),
        403
    );
    let posted = with(Method::POST, "/jobs", &own).json(&job).send().await.unwrap();
    assert_eq!(posted.status(), 201);
    let id = posted.json::<Value>().await.unwrap()["id"].as_str().unwrap().to_owned();
    // The stream ends with the job; then its files are there.
    let stream = with(Method::GET, &format!("/jobs/{id}/events"), "")
        .send()
        .await
        .unwrap();
    assert_eq!(stream.headers()["content-type"], "text/event-stream");
    assert!(stream.text().await.unwrap().contains("\"succeeded\""));
    let file = format!("/jobs/{id}/files/receipt.json");
    let file = with(Method::GET, &file, "").send().await.unwrap();
    assert_eq!(file.status(), 200);
    assert!(
        file.headers()["content-disposition"]
            .to_str()
            .unwrap()
            .starts_with("attachment")
    );

    assert_eq!(
        with(Method::GET, "/api-keys", "").send().await.unwrap().status(),
        403,
        "no admin"
    );
    assert_eq!(
        with(Method::DELETE, "/session", &own).send().await.unwrap().status(),
        204
    );
    assert_eq!(
        with(Method::GET, "/jobs", "").send().await.unwrap().status(),
        401,
        "signed out"
    );

    // A session ends with its key.
    let set = login(submit.reveal()).await.headers()["set-cookie"]
        .to_str()
        .unwrap()
        .to_owned();
    let cookie = set.split(';').next().unwrap();
    let read = async || {
        client
            .http
            .get(client.url("/jobs"))
            .header("cookie", cookie)
            .send()
            .await
            .unwrap()
            .status()
    };
    assert_eq!(read().await, 200);
    let id = id_of(&client, &submit).await;
    client.store().revoke_key(id, false).await.unwrap();
    assert_eq!(read().await, 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_others_can_reach_does_not_start_without_a_key() {
    let dir = tempfile::tempdir().unwrap();
    let start = async |more: &[(&str, &str)]| {
        let mut flags = vec![
            ("server.bind", "0.0.0.0:0".to_owned()),
            ("storage.data_dir", dir.path().to_str().unwrap().to_owned()),
        ];
        flags.extend(more.iter().map(|(key, value)| (*key, (*value).to_owned())));
        serve(Config::from_layers(None, std::collections::HashMap::new(), &flags).unwrap()).await
    };
    let jobs = async |port: u16| {
        reqwest::get(format!("http://127.0.0.1:{port}/jobs"))
            .await
            .unwrap()
            .status()
            .as_u16()
    };
    let refused = start(&[]).await.unwrap_err();
    assert!(matches!(refused, ServeError::Exposed(_)));
    let text = refused.to_string();
    assert!(
        text.contains("lorad keys create") && text.contains("--insecure-no-auth"),
        "{text}"
    );

    let open = start(&[("server.insecure_no_auth", "true")]).await.unwrap();
    assert_eq!(jobs(open.address().port()).await, 200, "as it was told");
    open.shutdown().await;
    let required = start(&[("server.auth", "required")]).await.unwrap();
    assert_eq!(
        jobs(required.address().port()).await,
        401,
        "locked, though nobody has a key"
    );
    let made = Key::random().unwrap();
    let new = NewApiKey {
        name: "me".to_owned(),
        scope: Scope::Admin,
        prefix: made.prefix().to_owned(),
        sha256: made.sha256(),
        expires_at_ms: None,
        quota: Quota::default(),
    };
    required.app().store.insert_key(&new).await.unwrap();
    required.shutdown().await;
    for more in [&[][..], &[("server.insecure_no_auth", "true")]] {
        let server = start(more).await.unwrap();
        assert_eq!(
            jobs(server.address().port()).await,
            401,
            "{more:?}: keys that exist are asked for"
        );
        server.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_made_and_revoked_on_the_command_line_count_at_once_on_a_running_server() {
    let client = Client::start().await;
    let lorad = |arguments: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_lorad"));
        command.arg("keys").args(arguments).arg("--data-dir").arg(client.data());
        let output = command.output().unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stdout).unwrap(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    assert_eq!(ask(&client, &Method::GET, "/jobs", "").await.0, 200);
    let (code, out, err) = lorad(&["create", "--name", "me", "--scope", "read", "--expires", "90d"]);
    assert_eq!(code, Some(0), "{err}");
    assert!(err.contains("first key"), "{err}");
    let key = Key::parse(out.trim()).expect("the key alone is on stdout");
    assert_eq!(ask(&client, &Method::GET, "/jobs", "").await.0, 401);
    assert_eq!(ask(&client, &Method::GET, "/jobs", &bearer(&key)).await.0, 200);
    let (_, listed, _) = lorad(&["list", "--json"]);
    let listed: Value = serde_json::from_str(&listed).unwrap();
    assert_eq!(
        (&listed[0]["name"], &listed[0]["status"]),
        (&json!("me"), &json!("valid"))
    );
    assert!(!listed.to_string().contains(&key.reveal()[14..]));
    assert_eq!(lorad(&["revoke", key.prefix()]).0, Some(0));
    assert_eq!(ask(&client, &Method::GET, "/jobs", &bearer(&key)).await.0, 401);
    assert_eq!(lorad(&["revoke", "key_nothing"]).0, Some(1));
    assert_eq!(lorad(&["create", "--name", "x", "--scope", "all"]).0, Some(2));
}
