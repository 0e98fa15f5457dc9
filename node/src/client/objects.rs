//! Objects that the demo and the benchmarks make alike, and waiting for them.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::json;

use super::Service::{Compute, Image, Network};
use super::{Client, text};
use crate::embedded::GUEST_IMAGE;

/// How long any single wait may take.
const PATIENCE: Duration = Duration::from_secs(90);
const POLL: Duration = Duration::from_millis(10);

pub(crate) async fn create_image(client: &Client) -> Result<String> {
    let body = json!({
        "name": "trine-guest", "disk_format": "raw", "container_format": "bare",
        "visibility": "public",
    });
    let image = text(&client.post(Image, "images", &body).await?, "/id")?;
    client.upload_image(&image, GUEST_IMAGE).await?;
    poll("the image to become active", || async {
        let body = client.get(Image, &format!("images/{image}")).await?;
        Ok((body["status"] == "active").then_some(()))
    })
    .await?;
    Ok(image)
}

pub(crate) async fn create_flavor(client: &Client, name: &str) -> Result<String> {
    let body = json!({"flavor": {"name": name, "ram": 64, "vcpus": 1, "disk": 0}});
    text(&client.post(Compute, "flavors", &body).await?, "/flavor/id")
}

pub(crate) async fn create_network(client: &Client, name: &str) -> Result<String> {
    let body = json!({"network": {"name": name, "admin_state_up": true}});
    text(&client.post(Network, "networks", &body).await?, "/network/id")
}

pub(crate) async fn create_subnet(client: &Client, network: &str) -> Result<String> {
    let body = json!({"subnet": {
        "network_id": network, "ip_version": 4, "cidr": "10.9.0.0/24",
    }});
    text(&client.post(Network, "subnets", &body).await?, "/subnet/id")
}

/// Asks until there is something, an error, or no more patience.
pub(crate) async fn poll<T, F>(what: &str, mut ask: impl FnMut() -> F) -> Result<T>
where
    F: Future<Output = Result<Option<T>>>,
{
    let start = Instant::now();
    loop {
        if let Some(found) = ask().await? {
            return Ok(found);
        }
        ensure!(start.elapsed() < PATIENCE, "waited {} s for {what}", PATIENCE.as_secs());
        tokio::time::sleep(POLL).await;
    }
}

/// Asks until it succeeds; the last error is the reason where it never does.
pub(crate) async fn poll_ok<T, F>(what: &str, mut ask: impl FnMut() -> F) -> Result<T>
where
    F: Future<Output = Result<T>>,
{
    let start = Instant::now();
    loop {
        match ask().await {
            Ok(value) => return Ok(value),
            Err(error) if start.elapsed() > PATIENCE => {
                return Err(error.context(format!("waited {} s for {what}", PATIENCE.as_secs())));
            }
            Err(_) => tokio::time::sleep(POLL).await,
        }
    }
}
