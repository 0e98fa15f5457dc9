//! What a cloud needs before it can have a guest.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};
use serde_json::json;
use tests::trine;

use crate::api::{Api, id};

/// Image, flavor and network for guests.
pub(crate) struct Made {
    pub(crate) image: String,
    pub(crate) flavor: String,
    pub(crate) network: String,
}

/// Makes them; the image passes through a file below `scratch`.
pub(crate) async fn prepare(scratch: &Path, api: &Api) -> Result<Made> {
    let file = scratch.join("guest.img");
    let export = Command::new(trine()).args(["image", "export"]).arg(&file).status()?;
    ensure!(export.success(), "trine image export");
    let image = api.image("guest", std::fs::read(&file)?).await?;
    let flavor = json!({"flavor": {"name": "tiny", "ram": 64, "vcpus": 1, "disk": 0}});
    let flavor = id(&api.make("/compute/v2.1/flavors", flavor).await?)?;
    let network = json!({"network": {"name": "net"}});
    let network = id(&api.make("/networking/v2.0/networks", network).await?)?;
    let subnet =
        json!({"subnet": {"network_id": network, "ip_version": 4, "cidr": "10.30.0.0/24"}});
    api.make("/networking/v2.0/subnets", subnet).await?;
    Ok(Made { image, flavor, network })
}
