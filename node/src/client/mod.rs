//! A client of the REST APIs, as any other: a token, the catalog, JSON over HTTPS. The demo and
//! the benchmarks use it; nothing in it knows how the server works.

mod error;
mod https;
pub(crate) mod objects;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use http::request::Builder;
use http::{Method, Request, Response};
use http_body_util::Full;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

pub(crate) use error::ApiError;
use https::Https;

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
    https: Https,
    /// `ADDRESS:PORT`
    authority: String,
    token: String,
    project_id: String,
}

impl Client {
    /// Signs in.
    ///
    /// # Errors
    /// Where the node can't be reached, or the API's own refusal.
    pub(crate) async fn sign_in(credentials: &Credentials) -> Result<Client> {
        let https = Https::new(&credentials.cacert)?;
        let authority = authority(&credentials.auth_url)?;
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
        let mut client =
            Client { https, authority, token: String::new(), project_id: String::new() };
        let request = Request::post("/identity/v3/auth/tokens");
        let response = client.send(request, Content::Json(&body)).await?;
        let token = response.headers().get("x-subject-token");
        let token = token.context("the answer to sign-in carries no X-Subject-Token")?;
        client.token = token.to_str()?.to_string();
        client.project_id = text(&decoded(&response)?, "/token/project/id")?;
        Ok(client)
    }

    /// The same token at another node's API.
    pub(crate) fn at(&self, address: &str) -> Client {
        Client { authority: address.to_string(), ..self.clone() }
    }

    /// The project that the token is for.
    pub(crate) fn project_id(&self) -> &str {
        &self.project_id
    }

    fn request(&self, service: Service, method: Method, path: &str) -> Builder {
        let path = match service {
            Service::Compute => format!("/compute/v2.1/{path}"),
            Service::Image => format!("/image/v2/{path}"),
            Service::Network => format!("/networking/v2.0/{path}"),
            Service::Volume => format!("/volume/v3/{}/{path}", self.project_id),
        };
        let request = Request::builder().method(method).uri(path);
        let request = request.header("x-auth-token", &self.token);
        match service {
            Service::Compute => {
                request.header("openstack-api-version", format!("compute {COMPUTE_MICROVERSION}"))
            }
            _ => request,
        }
    }

    async fn send(&self, request: Builder, content: Content<'_>) -> Result<Response<Bytes>> {
        let request = request.header("host", &self.authority);
        let request = match content {
            Content::Nothing => request.body(Full::default()),
            Content::Json(body) => request
                .header("content-type", "application/json")
                .body(Full::new(Bytes::from(body.to_string()))),
            Content::Octets(content) => request
                .header("content-type", "application/octet-stream")
                .body(Full::new(Bytes::from_static(content))),
        }?;
        let what = format!("{} {}", request.method(), request.uri().path());
        let response = self.https.send(&self.authority, request).await;
        let response = response.with_context(|| format!("{what}: the node did not answer"))?;
        if response.status().is_success() {
            return Ok(response);
        }
        let body = String::from_utf8_lossy(response.body());
        Err(ApiError::new(what, response.status().as_u16(), &body).into())
    }

    /// GET, decoded.
    pub(crate) async fn get(&self, service: Service, path: &str) -> Result<Value> {
        let request = self.request(service, Method::GET, path);
        decoded(&self.send(request, Content::Nothing).await?)
    }

    /// POST, decoded (null for an empty answer).
    pub(crate) async fn post(&self, service: Service, path: &str, body: &Value) -> Result<Value> {
        let request = self.request(service, Method::POST, path);
        decoded(&self.send(request, Content::Json(body)).await?)
    }

    /// DELETE.
    pub(crate) async fn delete(&self, service: Service, path: &str) -> Result<()> {
        let request = self.request(service, Method::DELETE, path);
        self.send(request, Content::Nothing).await.map(drop)
    }

    /// Puts an image's content into the catalog.
    pub(crate) async fn upload_image(&self, image_id: &str, content: &'static [u8]) -> Result<()> {
        let path = format!("images/{image_id}/file");
        let request = self.request(Service::Image, Method::PUT, &path);
        self.send(request, Content::Octets(content)).await.map(drop)
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

/// What a request carries.
enum Content<'a> {
    Nothing,
    Json(&'a Value),
    Octets(&'static [u8]),
}

fn authority(auth_url: &str) -> Result<String> {
    let inner = auth_url.strip_prefix("https://");
    let authority = inner.and_then(|inner| inner.strip_suffix("/identity/v3"));
    let rule = "must be https://ADDRESS:PORT/identity/v3";
    Ok(authority.with_context(|| format!("auth_url {auth_url:?} {rule}"))?.to_string())
}

fn decoded(response: &Response<Bytes>) -> Result<Value> {
    if response.body().is_empty() {
        return Ok(Value::Null);
    }
    serde_json::from_slice(response.body()).context("the answer is not JSON")
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
