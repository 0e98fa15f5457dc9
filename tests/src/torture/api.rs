//! A client of one node's API that knows three ends of a request: answered, not sent, lost.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use reqwest::Method;
use serde_json::{Value, json};

/// How long a client waits for an answer: longer than a change of leader takes.
const PATIENCE: Duration = Duration::from_secs(15);
const CONNECT_WITHIN: Duration = Duration::from_secs(3);

/// How to sign in at any node.
pub(super) struct Credentials {
    pub(super) file: Value,
    pub(super) authority: Vec<u8>,
}

/// What became of a request.
#[derive(Debug)]
pub(super) enum Reply {
    /// The API answered, with less than 500.
    Answer(u16, Value),
    /// It did not reach the API.
    NotSent(String),
    /// Its outcome is unknown.
    Lost(String),
}

/// A client of one node.
#[derive(Clone)]
pub(super) struct Api {
    http: reqwest::Client,
    base: String,
    credentials: Arc<Credentials>,
    token: Arc<Mutex<Option<String>>>,
}

impl Api {
    /// A client of the node at `address`; it signs in with its first request.
    pub(super) fn new(address: std::net::Ipv4Addr, credentials: &Arc<Credentials>) -> Result<Api> {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder()
            .tls_certs_only([reqwest::Certificate::from_pem(&credentials.authority)?])
            .no_proxy()
            .timeout(PATIENCE)
            .connect_timeout(CONNECT_WITHIN)
            .build()?;
        Ok(Api {
            http,
            base: format!("https://{address}:8774"),
            credentials: Arc::clone(credentials),
            token: Arc::default(),
        })
    }

    /// Signs in and returns the answer's body.
    pub(super) async fn sign_in(&self) -> Result<Value> {
        let file = &self.credentials.file;
        let domain = json!({"name": "Default"});
        let user = json!({
            "name": file["username"], "domain": domain, "password": file["password"],
        });
        let body = json!({"auth": {
            "identity": {"methods": ["password"], "password": {"user": user}},
            "scope": {"project": {"name": file["project_name"], "domain": domain}},
        }});
        let url = format!("{}/identity/v3/auth/tokens", self.base);
        let response = self.http.post(url).json(&body).send().await?;
        ensure!(response.status() == 201, "sign-in: {}", response.status());
        let token = response.headers().get("x-subject-token").context("no token")?;
        let token = token.to_str()?.to_owned();
        let body = response.json().await?;
        *self.token.lock().unwrap_or_else(PoisonError::into_inner) = Some(token);
        Ok(body)
    }

    async fn token(&self) -> Result<String> {
        loop {
            let token = self.token.lock().unwrap_or_else(PoisonError::into_inner).clone();
            match token {
                Some(token) => return Ok(token),
                None => drop(self.sign_in().await?),
            }
        }
    }

    /// One request. A token that is no longer taken is replaced once.
    pub(super) async fn call(&self, method: Method, path: &str, body: Option<&Value>) -> Reply {
        for _ in 0..2 {
            let token = match self.token().await {
                Ok(token) => token,
                Err(error) => return Reply::NotSent(format!("{error:#}")),
            };
            match self.send(method.clone(), path, body, &token).await {
                Reply::Answer(401, _) => {
                    *self.token.lock().unwrap_or_else(PoisonError::into_inner) = None;
                }
                reply => return reply,
            }
        }
        Reply::NotSent("401 with a new token".into())
    }

    async fn send(&self, method: Method, path: &str, body: Option<&Value>, token: &str) -> Reply {
        let mut request = self
            .http
            .request(method, format!("{}{path}", self.base))
            .header("x-auth-token", token)
            .header("openstack-api-version", "compute 2.64");
        if let Some(body) = body {
            request = request.json(body);
        }
        let response = match request.send().await {
            Ok(response) => response,
            Err(error) if error.is_connect() => return Reply::NotSent(format!("{error:?}")),
            Err(error) => return Reply::Lost(format!("{error:?}")),
        };
        let status = response.status().as_u16();
        match response.bytes().await {
            Ok(bytes) if status >= 500 => {
                Reply::Lost(format!("{status} {}", String::from_utf8_lossy(&bytes)))
            }
            Ok(bytes) => {
                Reply::Answer(status, serde_json::from_slice(&bytes).unwrap_or(Value::Null))
            }
            Err(error) => Reply::Lost(format!("{status}, then {error:?}")),
        }
    }

    /// A request that must succeed.
    pub(super) async fn must(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Value> {
        match self.call(method.clone(), path, body).await {
            Reply::Answer(status, body) if status < 300 => Ok(body),
            reply => bail!("{method} {path}: {reply:?}"),
        }
    }

    /// A GET that must succeed.
    pub(super) async fn get(&self, path: &str) -> Result<Value> {
        self.must(Method::GET, path, None).await
    }

    /// A POST that must succeed.
    pub(super) async fn post(&self, path: &str, body: Value) -> Result<Value> {
        self.must(Method::POST, path, Some(&body)).await
    }

    /// A server's whole console log.
    pub(super) async fn console(&self, server: &str) -> Result<String> {
        let path = format!("/compute/v2.1/servers/{server}/action");
        let answer = self.post(&path, json!({"os-getConsoleOutput": {}})).await?;
        Ok(answer["output"].as_str().unwrap_or_default().to_owned())
    }

    /// Uploads an image and returns its id.
    pub(super) async fn image(&self, name: &str, content: Vec<u8>) -> Result<String> {
        let body = json!({"name": name, "disk_format": "raw", "container_format": "bare"});
        let image = id(&self.post("/image/v2/images", body).await?)?;
        let response = self
            .http
            .put(format!("{}/image/v2/images/{image}/file", self.base))
            .header("x-auth-token", self.token().await?)
            .header("content-type", "application/octet-stream")
            .body(content)
            .send()
            .await?;
        ensure!(response.status() == 204, "upload: {}", response.status());
        Ok(image)
    }
}

/// The id in an answer, whether wrapped in its kind or not.
pub(super) fn id(answer: &Value) -> Result<String> {
    let inner = answer.as_object().and_then(|object| object.values().next());
    let found = answer["id"].as_str().or_else(|| inner?["id"].as_str());
    Ok(found.with_context(|| format!("no id in {answer}"))?.to_owned())
}
