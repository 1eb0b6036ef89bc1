//! Compiles the wire interfaces, without protoc, and keeps their description for logs (`telemetry::describe`).

use protox::prost::Message;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    let files = protox::compile(["csi.proto", "agent.proto"], ["proto"])?;
    let out = std::env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?;
    let path = std::path::Path::new(&out).join("interfaces.bin");
    std::fs::write(path, files.encode_to_vec())?;
    // They hold secrets: `agent::local` shows the rest.
    let secret = ["petra.agent.v1.Repository", "petra.agent.v1.DeleteVolumeRequest"];
    tonic_prost_build::configure().skip_debug(secret).compile_fds(files)?;
    Ok(())
}
