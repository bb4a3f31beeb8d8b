//! The audit log: who, from where, what, and what came of it.

use lorad::domain::{Quota, Scope};
use serde_json::{Value, json};

use crate::{
    access::{bearer, key_with},
    client::Client,
};

#[tokio::test(flavor = "multi_thread")]
async fn every_change_is_written_down_and_reading_is_not() {
    let client = Client::start_with(&[("server.trusted_proxies", "127.0.0.0/8")]).await;
    let admin = key_with(&client, Scope::Admin, None, Quota::default()).await;
    let reader = key_with(&client, Scope::Read, None, Quota::default()).await;
    let send = async |method: reqwest::Method, path: &str, authorization: String, body: Value| {
        let mut request = client
            .http
            .request(method, client.url(path))
            .header("x-forwarded-for", "6.6.6.6, 198.51.100.7");
        if !authorization.is_empty() {
            request = request.header("authorization", authorization);
        }
        let response = request.json(&body).send().await.unwrap();
        let id = response.headers()["x-request-id"].to_str().unwrap().to_owned();
        (
            response.status().as_u16(),
            id,
            response.json::<Value>().await.unwrap_or_default(),
        )
    };
    let log = async |query: &str| {
        let request = client
            .http
            .get(client.url(&format!("/audit{query}")))
            .header("authorization", bearer(&admin));
        request.send().await.unwrap().json::<Value>().await.unwrap()
    };
    use reqwest::Method;
    let (status, made_in, made) = send(
        Method::POST,
        "/api-keys?x=secret",
        bearer(&admin),
        json!({"name": "ci", "scope": "read"}),
    )
    .await;
    assert_eq!(status, 201, "{made}");
    send(Method::DELETE, "/datasets/ds_none", bearer(&reader), json!({})).await;
    send(Method::POST, "/jobs", String::new(), json!({})).await;
    send(Method::GET, "/jobs", bearer(&admin), json!({})).await;
    let found = log("").await;
    let rows = found["data"].as_array().unwrap();
    let told: Vec<Value> = rows
        .iter()
        .map(|row| {
            json!([
                row["key_name"],
                row["method"],
                row["path"],
                row["outcome"],
                row["status"]
            ])
        })
        .collect();
    assert_eq!(
        told,
        [
            json!([null, "POST", "/jobs", "refused", 401]),
            json!(["read key", "DELETE", "/datasets/ds_none", "refused", 403]),
            json!(["admin key", "POST", "/api-keys", "done", 201]),
        ]
    );
    let entry = &rows[2];
    assert_eq!(
        (&entry["address"], &entry["object"]),
        (&json!("198.51.100.7"), &made["id"]),
        "{entry:#}"
    );
    assert_eq!(entry["request_id"], made_in.as_str());
    assert!(!found.to_string().contains(made["key"].as_str().unwrap()) && !found.to_string().contains("x=secret"));

    let page = log("?limit=2").await;
    assert_eq!(
        (page["data"].as_array().unwrap().len(), &page["has_more"]),
        (2, &json!(true))
    );
    let rest = log(&format!("?limit=2&after={}", page["last_id"].as_str().unwrap())).await;
    assert_eq!(
        (rest["data"][0]["id"].clone(), &rest["has_more"]),
        (entry["id"].clone(), &json!(false))
    );
    assert_eq!(log("?after=x").await["code"], "cursor.invalid");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_is_bounded_and_survives_a_restart() {
    let mut client = Client::start_with(&[("server.audit_entries", "100")]).await;
    for n in 0..200 {
        let (status, _) = client.post("/jobs/none/cancel", &json!({})).await;
        assert_eq!(status, 404, "{n}");
    }
    client.restart().await;
    let kept = client.json("/audit?limit=1000").await["data"].as_array().unwrap().len();
    assert_eq!(kept, 100);
}
