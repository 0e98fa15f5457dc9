//! python-openstackclient, unmodified, does the main job.

use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tests::{Cloud, Options};

use super::python;
use crate::shell;

const CLIENT: &str = "python-openstackclient==10.5.0";
const SDK: &str = "openstacksdk==4.22.0";
const STEPS: &str = "#trine-steps\nprint hello-from-user-data\n";
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs the suite.
pub(super) fn run(keep: bool, release: bool) -> Result<()> {
    let environment = python::environment("openstackclient", &[CLIENT, SDK])?;
    let cloud = Cloud::start(&build(release)?, Options { keep })?;
    let mut suite = Suite {
        openstack: environment.join("bin/openstack"),
        config: cloud.node(1).join("clouds.yaml"),
        passed: 0,
        failed: 0,
    };
    let image = cloud.directory().join("guest.img");
    shell::run(Command::new(cloud.trine()).args(["image", "export"]).arg(&image))?;
    let key = cloud.directory().join("key.pub");
    std::fs::write(
        &key,
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKnkfwdHUDEM2TgqoGwsL8QRBw6q999iIB24ghp17sb2 cli\n",
    )?;
    let user_data = cloud.directory().join("user-data");
    std::fs::write(&user_data, STEPS)?;

    suite.identity();
    suite.catalog_and_networks(&image, &key);
    suite.servers(&user_data);
    suite.volumes();
    suite.refusals(&image);
    suite.cleaning_up();
    drop(cloud);
    println!("{} passed, {} failed", suite.passed, suite.failed);
    if suite.failed > 0 {
        bail!("the client was not served as it expects; see the lines marked FAILED above");
    }
    Ok(())
}

fn build(release: bool) -> Result<PathBuf> {
    let mut build = shell::cargo();
    build.args(["build", "--locked", "--package", "node"]);
    if release {
        build.arg("--release");
    }
    shell::run(&mut build)?;
    let profile = if release { "release" } else { "debug" };
    Ok(shell::target_directory().join(profile).join("trine"))
}

struct Suite {
    openstack: PathBuf,
    config: PathBuf,
    passed: usize,
    failed: usize,
}

impl Suite {
    fn identity(&mut self) {
        self.check("token issue", |value| !text(value, "id").is_empty());
        self.check("catalog list", |value| {
            let names: Vec<String> = rows(value).iter().map(|row| text(row, "Type")).collect();
            let wanted = ["identity", "compute", "image", "network", "block-storage"];
            wanted.iter().all(|name| names.iter().any(|found| found == name))
        });
        self.check("project list", |value| has(value, "Name", "admin"));
        self.check("user list", |value| has(value, "Name", "admin"));
        self.check("role list", |value| {
            ["admin", "member", "reader"].iter().all(|role| has(value, "Name", role))
        });
    }

    fn catalog_and_networks(&mut self, image: &std::path::Path, key: &std::path::Path) {
        let (image, key) = (image.display(), key.display());
        self.check("flavor create --ram 64 --disk 0 --vcpus 1 cli.tiny", |value| {
            value["ram"] == 64
        });
        self.check("flavor list", |value| has(value, "Name", "cli.tiny"));
        self.check(
            &format!(
                "image create --file {image} --disk-format raw --container-format bare cli-image"
            ),
            |value| !text(value, "id").is_empty(),
        );
        self.check_until("image show cli-image", |value| text(value, "status") == "active");
        self.check("image list", |value| has(value, "Name", "cli-image"));
        self.check(&format!("keypair create --public-key {key} cli-key"), |value| {
            text(value, "name") == "cli-key"
        });
        self.check("keypair list", |value| has(value, "Name", "cli-key"));
        self.check("network create cli-net", |value| text(value, "name") == "cli-net");
        self.check("network list", |value| has(value, "Name", "cli-net"));
        self.check(
            "subnet create --network cli-net --subnet-range 10.20.0.0/24 cli-subnet",
            |value| text(value, "gateway_ip") == "10.20.0.1",
        );
        self.check("subnet list", |value| has(value, "Name", "cli-subnet"));
        self.check("port create --network cli-net cli-port", |value| {
            value["fixed_ips"].to_string().contains("10.20.0.")
        });
        self.check("port list", |value| has(value, "Name", "cli-port"));
        self.check("server group create --policy anti-affinity cli-group", |value| {
            text(value, "policy") == "anti-affinity"
        });
        self.check("server group list", |value| has(value, "Name", "cli-group"));
    }

    fn servers(&mut self, user_data: &std::path::Path) {
        let create = format!(
            "server create --image cli-image --flavor cli.tiny --network cli-net --key-name cli-key \
             --user-data {} --config-drive True --wait cli-server",
            user_data.display()
        );
        self.check(&create, |value| text(value, "status") == "ACTIVE");
        self.check("server list", |value| {
            rows(value).iter().any(|row| {
                text(row, "Name") == "cli-server"
                    && text(row, "Status") == "ACTIVE"
                    && row["Networks"].to_string().contains("10.20.0.")
                    && text(row, "Flavor") == "cli.tiny"
            })
        });
        self.check("server show cli-server", |value| {
            text(value, "status") == "ACTIVE" && text(value, "key_name") == "cli-key"
        });
        self.check_text_until("console log show cli-server", |log| {
            log.contains("hello-from-user-data") && log.contains("trine: steps done")
        });
    }

    fn volumes(&mut self) {
        self.check("volume create --size 1 cli-volume", |value| value["size"] == 1);
        self.check_until("volume show cli-volume", |value| text(value, "status") == "available");
        self.check("volume list", |value| has(value, "Name", "cli-volume"));
        self.check("server add volume cli-server cli-volume", |value| {
            !text(value, "Volume ID").is_empty() || !text(value, "volume_id").is_empty()
        });
        self.check_until("volume show cli-volume", |value| text(value, "status") == "in-use");
        self.refused("volume delete cli-volume", "in-use");
        self.done("server remove volume cli-server cli-volume");
        self.check_until("volume show cli-volume", |value| text(value, "status") == "available");
    }

    fn refusals(&mut self, image: &std::path::Path) {
        self.refused("--os-token wrong --os-auth-type token flavor list", "401");
        self.refused("image show no-such-image", "No Image found for no-such-image");
        self.refused(
            "server create --image no-such-image --flavor cli.tiny --network cli-net x",
            "No Image found for no-such-image",
        );
        self.refused(
            &format!("image create --file {} --disk-format nonsense x", image.display()),
            "nonsense",
        );
        self.done("flavor create --ram 100000000 --disk 0 --vcpus 1 cli.huge");
        self.done("server create --image cli-image --flavor cli.huge --network cli-net cli-giant");
        self.check_until("server show cli-giant", |value| {
            let fault = value["fault"].to_string();
            text(value, "status") == "ERROR"
                && fault.contains("No valid host")
                && fault.contains("MEMORY_MB")
        });
        self.done("server delete --wait cli-giant");
        self.done("flavor delete cli.huge");
    }

    fn cleaning_up(&mut self) {
        self.done("server delete --wait cli-server");
        self.check("server list", |value| !has(value, "Name", "cli-server"));
        for command in [
            "volume delete cli-volume",
            "server group delete cli-group",
            "port delete cli-port",
            "subnet delete cli-subnet",
            "network delete cli-net",
            "keypair delete cli-key",
            "image delete cli-image",
            "flavor delete cli.tiny",
        ] {
            self.done(command);
        }
        self.check("image list", |value| !has(value, "Name", "cli-image"));
        self.check_until("volume list", |value| !has(value, "Name", "cli-volume"));
    }

    fn call(&self, command: &str, json: bool) -> Result<Output> {
        let mut call = Command::new(&self.openstack);
        call.env("OS_CLIENT_CONFIG_FILE", &self.config);
        if command.contains("--os-token") {
            call.env("OS_AUTH_URL", self.auth_url()?).env("OS_CACERT", self.authority());
            call.env("OS_PROJECT_NAME", "admin").env("OS_PROJECT_DOMAIN_NAME", "Default");
        } else {
            call.env("OS_CLOUD", "trine");
        }
        call.args(command.split_whitespace());
        if json {
            call.args(["-f", "json"]);
        }
        call.output().with_context(|| format!("cannot start {}", self.openstack.display()))
    }

    fn authority(&self) -> PathBuf {
        let directory = self.config.parent().expect("a file has a directory");
        let credentials = std::fs::read(directory.join("credentials.json")).unwrap_or_default();
        let credentials: Value = serde_json::from_slice(&credentials).unwrap_or_default();
        PathBuf::from(text(&credentials, "cacert"))
    }

    fn auth_url(&self) -> Result<String> {
        let directory = self.config.parent().context("a file has a directory")?;
        let credentials = std::fs::read(directory.join("credentials.json"))?;
        Ok(text(&serde_json::from_slice(&credentials)?, "auth_url"))
    }

    fn json(&self, command: &str) -> Result<Value> {
        let output = self.call(command, true)?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
        if output.stdout.iter().all(u8::is_ascii_whitespace) {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&output.stdout).context("its output is not JSON")
    }

    /// The command succeeds and what it prints as JSON is right.
    fn check(&mut self, command: &str, right: impl Fn(&Value) -> bool) {
        let result = self.json(command).and_then(|value| {
            ensure!(right(&value), "printed {value}");
            Ok(())
        });
        self.record(command, result);
    }

    /// As `check`, asked until it is right or patience ends.
    fn check_until(&mut self, command: &str, right: impl Fn(&Value) -> bool) {
        let result = until(|| {
            let value = self.json(command)?;
            ensure!(right(&value), "printed {value}");
            Ok(())
        });
        self.record(command, result);
    }

    /// As `check_until`, for a command without JSON.
    fn check_text_until(&mut self, command: &str, right: impl Fn(&str) -> bool) {
        let result = until(|| {
            let output = self.call(command, false)?;
            let printed = String::from_utf8_lossy(&output.stdout).into_owned();
            ensure!(output.status.success() && right(&printed), "printed {printed}");
            Ok(())
        });
        self.record(command, result);
    }

    /// The command succeeds.
    fn done(&mut self, command: &str) {
        let result = self.call(command, false).and_then(|output| {
            ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
            Ok(())
        });
        self.record(command, result);
    }

    /// The command fails, and the message says `reason`.
    fn refused(&mut self, command: &str, reason: &str) {
        let result = self.call(command, false).and_then(|output| {
            let message = String::from_utf8_lossy(&output.stderr).into_owned();
            ensure!(!output.status.success(), "it was not refused");
            ensure!(message.contains(reason), "refused with {:?}", message.trim());
            Ok(())
        });
        self.record(&format!("(refused) {command}"), result);
    }

    fn record(&mut self, command: &str, result: Result<()>) {
        match result {
            Ok(()) => {
                self.passed += 1;
                println!("ok      openstack {command}");
            }
            Err(error) => {
                self.failed += 1;
                println!("FAILED  openstack {command}\n        {error:#}");
            }
        }
    }
}

fn until(mut attempt: impl FnMut() -> Result<()>) -> Result<()> {
    let start = Instant::now();
    loop {
        match attempt() {
            Err(error) if start.elapsed() > PATIENCE => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(200)),
            Ok(()) => return Ok(()),
        }
    }
}

fn text(value: &Value, name: &str) -> String {
    value[name].as_str().unwrap_or_default().to_string()
}

fn rows(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn has(value: &Value, column: &str, wanted: &str) -> bool {
    rows(value).iter().any(|row| text(row, column) == wanted)
}
