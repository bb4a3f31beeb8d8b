//! Base models from a hub that speaks Hugging Face's API: which commit a revision is, which of its files are needed, and
//! those files, checked.
//!
//! [`Hub`] asks, [`choose`](select::choose) decides, [`pull`](pull::pull) downloads into a folder. Knows no database and no
//! HTTP handler; called by `http::models` and by the command line. Why not the crate `hf-hub`: docs/adr/0011.

mod pull;
mod select;

use std::{fmt, str::FromStr, time::Duration};

use lorad_proto::problem::Problem;
use reqwest::header;
use serde::Deserialize;
use serde_json::Value;

pub use pull::{Progress, pull};
pub use select::choose;

/// Where models are, unless settings or environment say otherwise.
pub const DEFAULT_ENDPOINT: &str = "https://huggingface.co";
/// Most pages of a file list: 1000 files each.
const MAX_PAGES: usize = 20;

/// `owner/name`, and a branch, tag or commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubId {
    /// `owner/name`.
    pub repository: String,
    /// `main` if none was given.
    pub revision: String,
}

impl FromStr for HubId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (repository, revision) = text.split_once('@').unwrap_or((text, "main"));
        let word = |text: &str| {
            !text.is_empty()
                && text.len() <= 96
                && !text.starts_with(['.', '-'])
                && !text.contains("..")
                && text
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
        };
        let fits = repository
            .split_once('/')
            .is_some_and(|(owner, name)| word(owner) && word(name))
            && revision.len() <= 200
            && revision.split('/').all(word);
        if fits {
            Ok(Self {
                repository: repository.to_owned(),
                revision: revision.to_owned(),
            })
        } else {
            Err("must be owner/name or owner/name@revision, of letters, digits, '.', '_' and '-'".to_owned())
        }
    }
}

impl fmt::Display for HubId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.repository, self.revision)
    }
}

impl HubId {
    /// A slug for the model: its name in small letters.
    pub fn slug(&self) -> String {
        let name = self.repository.rsplit('/').next().unwrap_or_default().to_lowercase();
        name.trim_start_matches(|c: char| !c.is_ascii_alphanumeric())
            .chars()
            .take(64)
            .collect()
    }
}

/// A file of a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteFile {
    /// Path in the repository.
    pub path: String,
    /// Size.
    pub bytes: u64,
    /// Of large files: SHA-256 of the content, hex. Else the SHA-1 that git gives it.
    pub hash: Hash,
}

/// What a file's content is checked against.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Hash {
    /// Hex.
    Sha256(String),
    /// Of `blob <size>\0<content>`, hex.
    GitSha1(String),
}

/// A commit of a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// `owner/name`.
    pub repository: String,
    /// 40 hex digits: what the revision was when it was asked.
    pub commit: String,
    /// What the repository says, may be empty.
    pub licence: String,
    /// All its files.
    pub files: Vec<RemoteFile>,
}

/// A hub.
#[derive(Clone)]
pub struct Hub {
    endpoint: String,
    /// Sent to the endpoint alone; never shown.
    token: Option<String>,
    http: reqwest::Client,
}

impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hub")
            .field("endpoint", &self.endpoint)
            .finish_non_exhaustive()
    }
}

#[derive(Deserialize)]
struct RevisionAnswer {
    sha: String,
    #[serde(default)]
    tags: Vec<String>,
    #[serde(default, rename = "cardData")]
    card: Value,
}

#[derive(Deserialize)]
struct TreeEntry {
    #[serde(rename = "type")]
    kind: String,
    path: String,
    #[serde(default)]
    size: u64,
    #[serde(default)]
    oid: String,
    lfs: Option<LfsEntry>,
}

#[derive(Deserialize)]
struct LfsEntry {
    oid: String,
    size: u64,
}

impl Hub {
    /// The hub at `setting`; where that is empty, at `HF_ENDPOINT` or the default. The token comes from `HF_TOKEN`.
    ///
    /// # Errors
    /// `hub.off` if the setting says so, `hub.endpoint` for what is no address.
    pub fn new(setting: &str) -> Result<Self, Problem> {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.trim().is_empty());
        let endpoint = match setting.trim() {
            "off" => {
                return Err(Problem::new(
                    "hub.off",
                    "Downloads are turned off",
                    "The setting models.hub_endpoint is \"off\".",
                )
                .with_hint("Register a folder under models.roots instead."));
            }
            "" => variable("HF_ENDPOINT").unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned()),
            given => given.to_owned(),
        };
        let bad = |why: String| Problem::new("hub.endpoint", "The hub's address cannot be used", why);
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        if !endpoint.starts_with("https://") && !endpoint.starts_with("http://") {
            return Err(bad(format!("{endpoint:?} begins with neither https:// nor http://.")));
        }
        let http = reqwest::Client::builder()
            .user_agent(concat!("lorad/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(Duration::from_secs(15))
            .read_timeout(Duration::from_secs(60))
            .build()
            .map_err(|e| bad(chain(&e)))?;
        Ok(Self {
            endpoint,
            token: variable("HF_TOKEN").map(|token| token.trim().to_owned()),
            http,
        })
    }

    /// The commit that a revision is now, and its files.
    ///
    /// # Errors
    /// `hub.not_found`, `hub.forbidden`, `hub.unreachable`, `hub.answer`.
    pub async fn snapshot(&self, id: &HubId) -> Result<Snapshot, Problem> {
        let HubId { repository, revision } = id;
        // A branch may have a slash in it.
        let revision = revision.replace('/', "%2F");
        let asked: RevisionAnswer = self
            .json(
                &format!("{}/api/models/{repository}/revision/{revision}", self.endpoint),
                id,
            )
            .await?
            .0;
        if asked.sha.len() != 40 || !asked.sha.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(strange(id, &format!("its commit is {:?}", asked.sha)));
        }
        let mut next = Some(format!(
            "{}/api/models/{repository}/tree/{}?recursive=true",
            self.endpoint, asked.sha
        ));
        let mut files = Vec::new();
        for _ in 0..MAX_PAGES {
            let Some(url) = next.take() else { break };
            let (entries, link): (Vec<TreeEntry>, _) = self.json(&url, id).await?;
            files.extend(entries.into_iter().filter(|entry| entry.kind == "file").map(|entry| {
                let (bytes, hash) = match entry.lfs {
                    Some(lfs) => (lfs.size, Hash::Sha256(lfs.oid)),
                    None => (entry.size, Hash::GitSha1(entry.oid)),
                };
                RemoteFile {
                    path: entry.path,
                    bytes,
                    hash,
                }
            }));
            // Only pages of this very hub.
            next = link.filter(|url| url.starts_with(&format!("{}/", self.endpoint)));
        }
        let card = asked.card.get("license").and_then(Value::as_str);
        let tag = || asked.tags.iter().find_map(|tag| tag.strip_prefix("license:"));
        Ok(Snapshot {
            repository: repository.clone(),
            licence: card.or_else(tag).unwrap_or_default().chars().take(200).collect(),
            commit: asked.sha.to_lowercase(),
            files,
        })
    }

    fn get(&self, url: &str) -> reqwest::RequestBuilder {
        let request = self.http.get(url);
        match &self.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        }
    }

    /// A JSON answer, and the next page's address.
    async fn json<T: serde::de::DeserializeOwned>(
        &self,
        url: &str,
        id: &HubId,
    ) -> Result<(T, Option<String>), Problem> {
        let response = self.get(url).send().await.map_err(|e| self.unreachable(&e))?;
        let response = self.accept(response, &id.to_string())?;
        let link = response.headers().get(header::LINK).and_then(|v| v.to_str().ok());
        let next = link.and_then(next_page).map(str::to_owned);
        let bytes = response.bytes().await.map_err(|e| self.unreachable(&e))?;
        let parsed = serde_json::from_slice(&bytes).map_err(|e| strange(id, &e.to_string()))?;
        Ok((parsed, next))
    }

    /// Turns refusals into words.
    fn accept(&self, response: reqwest::Response, what: &str) -> Result<reqwest::Response, Problem> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        Err(match status.as_u16() {
            401 | 403 => Problem::new(
                "hub.forbidden",
                "The hub does not give this model out",
                format!("{} answered {status} for {what}.", self.endpoint),
            )
            .with_hint(
                "The name may be misspelt. If the model is private or gated: accept its terms on the hub, and start lorad with a \
                 token that may read it in HF_TOKEN.",
            ),
            404 => Problem::new(
                "hub.not_found",
                "The hub has no such model or revision",
                format!("{} answered {status} for {what}.", self.endpoint),
            )
            .with_hint("Check owner, name and revision; private models need HF_TOKEN."),
            _ => Problem::new(
                "hub.unreachable",
                "The hub cannot be reached",
                format!("{} answered {status} for {what}.", self.endpoint),
            )
            .with_hint("Try again later; what has been downloaded is kept."),
        })
    }

    fn unreachable(&self, error: &reqwest::Error) -> Problem {
        Problem::new(
            "hub.unreachable",
            "The hub cannot be reached",
            format!("{}: {}.", self.endpoint, chain(error)),
        )
        .with_hint(
            "Is this machine online? A mirror can be set with models.hub_endpoint or HF_ENDPOINT; a folder that is here already \
             can be registered by its path. What has been downloaded is kept.",
        )
    }
}

/// An error with its causes; without the address, which `reqwest` repeats.
fn chain(error: &reqwest::Error) -> String {
    let mut text = String::new();
    let mut cause: Option<&dyn std::error::Error> = Some(error);
    while let Some(error) = cause {
        text = error.to_string();
        cause = error.source();
    }
    text.trim_end_matches('.').to_owned()
}

fn strange(id: &HubId, what: &str) -> Problem {
    Problem::new(
        "hub.answer",
        "The hub's answer cannot be understood",
        format!("Asked for {id}: {what}."),
    )
    .with_hint("Is models.hub_endpoint the address of a hub?")
}

/// `<address>; rel="next"` of a `Link` header.
fn next_page(link: &str) -> Option<&str> {
    link.split(',').find_map(|part| {
        let (address, relation) = part.trim().split_once(';')?;
        (relation.trim() == "rel=\"next\"").then(|| address.trim_matches(['<', '>']))
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_hub_id_is_owner_name_and_revision_and_nothing_that_leaves_the_hub() {
        let id: HubId = "someone/Tiny.SD-1@refs/pr/3".parse().unwrap();
        assert_eq!(
            (id.repository.as_str(), id.revision.as_str()),
            ("someone/Tiny.SD-1", "refs/pr/3")
        );
        assert_eq!(id.slug(), "tiny.sd-1");
        assert_eq!("a/b".parse::<HubId>().unwrap().revision, "main");
        for bad in [
            "",
            "a",
            "a/b/c",
            "../b",
            "a/..",
            "a/b@",
            "a/b@../x",
            "a/b?x",
            "a/b@x y",
            "https://a/b",
            "a/b#c",
        ] {
            assert!(bad.parse::<HubId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn the_next_page_is_found_in_a_link_header() {
        assert_eq!(
            next_page("<http://a/b?cursor=x>; rel=\"next\""),
            Some("http://a/b?cursor=x")
        );
        assert_eq!(next_page("<http://a/b>; rel=\"prev\""), None);
    }

    #[test]
    fn the_token_is_not_shown() {
        let hub = Hub {
            endpoint: "http://x".to_owned(),
            token: Some("secret".to_owned()),
            http: reqwest::Client::new(),
        };
        assert!(!format!("{hub:?}").contains("secret"));
    }
}
