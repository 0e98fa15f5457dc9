//! A client of the REST APIs, as any other: a token, the catalog, JSON over HTTPS. The demo and
//! the benchmarks use it; nothing in it knows how the server works.

mod error;
pub(crate) mod objects;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use reqwest::{Method, RequestBuilder, Response};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

pub(crate) use error::ApiError;

/// Newest compute microversion whose shapes this client knows.
const COMPUTE_MICROVERSION: &str = "2.64";

/// How to sign in: what `trine init` leaves in `credentials.json`.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Credentials {
    /// Identity endpoint, `https://ADDRESS:PORT/identity/v3`.
    pub(crate) auth_url: String,
    /// User name in the domain `Default`.
    pub(crate) username: String,
    /// Its password.
    pub(crate) password: String,
    /// Project name in the domain `Default`.
    pub(crate) project_name: String,
    /// File with the authority's certificate.
    pub(crate) cacert: PathBuf,
}

impl Credentials {
    /// Reads `credentials.json`.
    pub(crate) fn read(path: &Path) -> Result<Credentials> {
        let text = fs::read(path)
            .with_context(|| format!("cannot read credentials {}", path.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("{} is malformed", path.display()))
    }
}

/// A service of the catalog.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Service {
    /// `/compute/v2.1`
    Compute,
    /// `/image/v2`
    Image,
    /// `/networking/v2.0`
    Network,
    /// `/volume/v3/{project}`
    Volume,
}

/// A signed-in client of one node.
#[derive(Clone)]
pub(crate) struct Client {
    http: reqwest::Client,
    /// `https://ADDRESS:PORT`
    base: String,
    token: String,
    project_id: String,
}

impl Client {
    /// Signs in.
    ///
    /// # Errors
    /// Where the node can't be reached, or the API's own refusal.
    pub(crate) async fn sign_in(credentials: &Credentials) -> Result<Client> {
        let http = http_client(&credentials.cacert)?;
        let base = base_url(&credentials.auth_url)?;
        let body = json!({"auth": {
            "identity": {"methods": ["password"], "password": {"user": {
                "name": credentials.username,
                "domain": {"name": "Default"},
                "password": credentials.password,
            }}},
            "scope": {"project": {
                "name": credentials.project_name,
                "domain": {"name": "Default"},
            }},
        }});
        let request = http.post(format!("{}/auth/tokens", credentials.auth_url)).json(&body);
        let response = send(request).await?;
        let token = response
            .headers()
            .get("x-subject-token")
            .and_then(|value| value.to_str().ok())
            .context("the answer to sign-in carries no X-Subject-Token")?
            .to_string();
        let body: Value = response.json().await?;
        let project_id = text(&body, "/token/project/id")?;
        Ok(Client { http, base, token, project_id })
    }

    /// The same token at another node's API.
    pub(crate) fn at(&self, address: &str) -> Client {
        Client { base: format!("https://{address}"), ..self.clone() }
    }

    /// The project that the token is for.
    pub(crate) fn project_id(&self) -> &str {
        &self.project_id
    }

    fn request(&self, service: Service, method: Method, path: &str) -> RequestBuilder {
        let Client { base, project_id, .. } = self;
        let url = match service {
            Service::Compute => format!("{base}/compute/v2.1/{path}"),
            Service::Image => format!("{base}/image/v2/{path}"),
            Service::Network => format!("{base}/networking/v2.0/{path}"),
            Service::Volume => format!("{base}/volume/v3/{project_id}/{path}"),
        };
        let request = self.http.request(method, url).header("x-auth-token", &self.token);
        match service {
            Service::Compute => {
                request.header("openstack-api-version", format!("compute {COMPUTE_MICROVERSION}"))
            }
            _ => request,
        }
    }

    /// GET, decoded.
    pub(crate) async fn get(&self, service: Service, path: &str) -> Result<Value> {
        json_body(send(self.request(service, Method::GET, path)).await?).await
    }

    /// POST, decoded (null for an empty answer).
    pub(crate) async fn post(&self, service: Service, path: &str, body: &Value) -> Result<Value> {
        json_body(send(self.request(service, Method::POST, path).json(body)).await?).await
    }

    /// DELETE.
    pub(crate) async fn delete(&self, service: Service, path: &str) -> Result<()> {
        send(self.request(service, Method::DELETE, path)).await.map(drop)
    }

    /// Puts an image's content into the catalog.
    pub(crate) async fn upload_image(&self, image_id: &str, content: &'static [u8]) -> Result<()> {
        let request = self
            .request(Service::Image, Method::PUT, &format!("images/{image_id}/file"))
            .header("content-type", "application/octet-stream")
            .body(content);
        send(request).await.map(drop)
    }

    /// A server's console log.
    pub(crate) async fn console_log(&self, server_id: &str) -> Result<String> {
        let path = format!("servers/{server_id}/action");
        let answer =
            self.post(Service::Compute, &path, &json!({"os-getConsoleOutput": {}})).await?;
        text(&answer, "/output")
    }

    /// Deletes and waits until the object is gone.
    pub(crate) async fn delete_and_wait(&self, service: Service, path: &str) -> Result<()> {
        match self.delete(service, path).await {
            Err(error) if is_not_found(&error) => return Ok(()),
            result => result?,
        }
        let start = Instant::now();
        loop {
            match self.get(service, path).await {
                Err(error) if is_not_found(&error) => return Ok(()),
                Err(error) => return Err(error),
                Ok(_) if start.elapsed() > Duration::from_secs(60) => {
                    bail!("{path} is still there a minute after its deletion was accepted")
                }
                Ok(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }
}

fn http_client(cacert: &Path) -> Result<reqwest::Client> {
    let pem = fs::read(cacert).with_context(|| format!("cannot read {}", cacert.display()))?;
    let authority = reqwest::Certificate::from_pem(&pem)
        .with_context(|| format!("{} is no PEM certificate", cacert.display()))?;
    Ok(reqwest::Client::builder()
        .tls_certs_only([authority])
        .no_proxy()
        .tcp_nodelay(true)
        .timeout(Duration::from_secs(60))
        .build()?)
}

fn base_url(auth_url: &str) -> Result<String> {
    let base = auth_url
        .strip_suffix("/identity/v3")
        .with_context(|| format!("auth_url {auth_url:?} must end in /identity/v3"))?;
    Ok(base.to_string())
}

async fn send(request: RequestBuilder) -> Result<Response> {
    let (http, request) = request.build_split();
    let request = request?;
    let what = format!("{} {}", request.method(), request.url().path());
    let response =
        http.execute(request).await.with_context(|| format!("{what}: the node did not answer"))?;
    if response.status().is_success() {
        return Ok(response);
    }
    let status = response.status().as_u16();
    let body = response.text().await.unwrap_or_default();
    Err(ApiError::new(what, status, &body).into())
}

async fn json_body(response: Response) -> Result<Value> {
    let body = response.bytes().await?;
    if body.is_empty() {
        return Ok(Value::Null);
    }
    serde_json::from_slice(&body).context("the answer is not JSON")
}

/// Whether an error is the API's 404.
pub(crate) fn is_not_found(error: &anyhow::Error) -> bool {
    error.downcast_ref::<ApiError>().is_some_and(|error| error.status == 404)
}

/// The string at a JSON pointer of an answer.
pub(crate) fn text(answer: &Value, pointer: &str) -> Result<String> {
    let value = answer.pointer(pointer).and_then(Value::as_str);
    Ok(value
        .with_context(|| format!("the answer has no string at {pointer}: {answer}"))?
        .to_string())
}
