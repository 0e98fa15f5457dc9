//! A bare HTTPS client: what it sends and gets back is what the test says.
// Each test uses its part.
#![allow(dead_code)]

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use reqwest::Method;
use serde_json::{Value, json};
use tests::Cloud;

const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Api {
    http: reqwest::Client,
    base: String,
    pub(crate) token: String,
    pub(crate) project: String,
}

impl Api {
    /// Signs in as the administrator at a node.
    pub(crate) async fn sign_in(cloud: &Cloud, node: usize) -> Result<Api> {
        Self::sign_in_at(&cloud.credentials()?, &cloud.api_address(node)).await
    }

    /// Signs in with credentials as `trine init` leaves them, at `HOST:PORT`.
    pub(crate) async fn sign_in_at(credentials: &Value, address: &str) -> Result<Api> {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let authority = std::fs::read(credentials["cacert"].as_str().context("cacert")?)?;
        let http = reqwest::Client::builder()
            .tls_certs_only([reqwest::Certificate::from_pem(&authority)?])
            .no_proxy()
            .build()?;
        let base = format!("https://{address}");
        let mut api = Api { http, base, token: String::new(), project: String::new() };
        let domain = json!({"name": "Default"});
        let user = json!({
            "name": credentials["username"], "domain": domain, "password": credentials["password"],
        });
        let body = json!({"auth": {
            "identity": {"methods": ["password"], "password": {"user": user}},
            "scope": {"project": {"name": credentials["project_name"], "domain": domain}},
        }});
        let url = format!("{}/identity/v3/auth/tokens", api.base);
        let response = api.http.post(url).json(&body).send().await?;
        ensure!(response.status() == 201, "sign-in: {}", response.status());
        api.token = response.headers()["x-subject-token"].to_str()?.to_string();
        let body: Value = response.json().await?;
        api.project = body["token"]["project"]["id"].as_str().context("project id")?.to_string();
        Ok(api)
    }

    /// One request; the status and the decoded body (null where empty).
    pub(crate) async fn call(
        &self,
        method: Method,
        path: &str,
        body: Option<Value>,
    ) -> Result<(u16, Value)> {
        let mut request = self
            .http
            .request(method, format!("{}{path}", self.base))
            .header("x-auth-token", &self.token)
            .header("openstack-api-version", "compute 2.64");
        if let Some(body) = body {
            request = request.json(&body);
        }
        let response = request.send().await?;
        let status = response.status().as_u16();
        let bytes = response.bytes().await?;
        Ok((status, serde_json::from_slice(&bytes).unwrap_or(Value::Null)))
    }

    pub(crate) async fn get(&self, path: &str) -> Result<(u16, Value)> {
        self.call(Method::GET, path, None).await
    }

    /// A POST that must succeed.
    pub(crate) async fn make(&self, path: &str, body: Value) -> Result<Value> {
        let (status, answer) = self.call(Method::POST, path, Some(body)).await?;
        ensure!((200..300).contains(&status), "POST {path}: {status} {answer}");
        Ok(answer)
    }

    pub(crate) async fn delete(&self, path: &str) -> Result<(u16, Value)> {
        self.call(Method::DELETE, path, None).await
    }

    /// Uploads an image and returns its id.
    pub(crate) async fn image(&self, name: &str, content: Vec<u8>) -> Result<String> {
        let body = json!({"name": name, "disk_format": "raw", "container_format": "bare"});
        let image = id(&self.make("/image/v2/images", body).await?)?;
        let response = self
            .http
            .put(format!("{}/image/v2/images/{image}/file", self.base))
            .header("x-auth-token", &self.token)
            .header("content-type", "application/octet-stream")
            .body(content)
            .send()
            .await?;
        ensure!(response.status() == 204, "upload: {}", response.status());
        Ok(image)
    }

    /// Asks until `right` holds.
    pub(crate) async fn wait(&self, path: &str, right: impl Fn(&Value) -> bool) -> Result<Value> {
        let start = Instant::now();
        loop {
            let (_, answer) = self.get(path).await?;
            if right(&answer) {
                return Ok(answer);
            }
            ensure!(start.elapsed() < PATIENCE, "{path} stays {answer}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Waits until an object is gone.
    pub(crate) async fn wait_gone(&self, path: &str) -> Result<()> {
        let start = Instant::now();
        while self.get(path).await?.0 != 404 {
            ensure!(start.elapsed() < PATIENCE, "{path} does not go");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    /// Waits for a console line and returns the whole log.
    pub(crate) async fn console(&self, server: &str, line: &str) -> Result<String> {
        let start = Instant::now();
        loop {
            let path = format!("/compute/v2.1/servers/{server}/action");
            let answer = self.make(&path, json!({"os-getConsoleOutput": {}})).await?;
            let log = answer["output"].as_str().unwrap_or_default().to_string();
            if log.lines().any(|found| found.starts_with(line)) {
                return Ok(log);
            }
            ensure!(start.elapsed() < PATIENCE, "no line {line:?} in:\n{log}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// The id in an answer, whether wrapped in its kind or not.
pub(crate) fn id(answer: &Value) -> Result<String> {
    let inner = answer.as_object().and_then(|object| object.values().next());
    let found = answer["id"].as_str().or_else(|| inner?["id"].as_str());
    Ok(found.with_context(|| format!("no id in {answer}"))?.to_string())
}
