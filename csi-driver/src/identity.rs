//! The service Identity: who this is.

use std::sync::Arc;

use async_trait::async_trait;
use tonic::{Request, Response, Status};

use crate::DRIVER;
use crate::proto::csi::identity_server::Identity as Service;
use crate::proto::csi::plugin_capability::{Service as ServiceCapability, Type, VolumeExpansion};
use crate::proto::csi::plugin_capability::{service, volume_expansion};
use crate::proto::csi::{
    GetPluginCapabilitiesRequest, GetPluginCapabilitiesResponse, GetPluginInfoRequest,
    GetPluginInfoResponse, PluginCapability, ProbeRequest, ProbeResponse,
};

/// Tells whether the driver can do its work at this moment.
#[async_trait]
pub trait Readiness: Send + Sync {
    /// An error says what is missing.
    async fn ready(&self) -> Result<(), Status>;
}

/// The service.
pub struct Identity {
    is_controller: bool,
    readiness: Arc<dyn Readiness>,
}

impl Identity {
    /// The identity of a process with or without the controller's services.
    pub fn new(is_controller: bool, readiness: Arc<dyn Readiness>) -> Self {
        Self { is_controller, readiness }
    }
}

#[async_trait]
impl Service for Identity {
    async fn get_plugin_info(
        &self,
        _: Request<GetPluginInfoRequest>,
    ) -> Result<Response<GetPluginInfoResponse>, Status> {
        Ok(Response::new(GetPluginInfoResponse {
            name: DRIVER.to_owned(),
            vendor_version: env!("CARGO_PKG_VERSION").to_owned(),
            manifest: [].into(),
        }))
    }

    async fn get_plugin_capabilities(
        &self,
        _: Request<GetPluginCapabilitiesRequest>,
    ) -> Result<Response<GetPluginCapabilitiesResponse>, Status> {
        use service::Type as Kind;
        let mut services = vec![Kind::VolumeAccessibilityConstraints];
        if self.is_controller {
            services.extend([
                Kind::ControllerService,
                Kind::GroupControllerService,
                Kind::SnapshotMetadataService,
            ]);
        }
        let services = services
            .into_iter()
            .map(|kind| Type::Service(ServiceCapability { r#type: kind.into() }));
        let expansion = [volume_expansion::Type::Online, volume_expansion::Type::Offline]
            .map(|kind| Type::VolumeExpansion(VolumeExpansion { r#type: kind.into() }));
        let capabilities = services
            .chain(expansion)
            .map(|capability| PluginCapability { r#type: Some(capability) })
            .collect();
        Ok(Response::new(GetPluginCapabilitiesResponse { capabilities }))
    }

    async fn probe(&self, _: Request<ProbeRequest>) -> Result<Response<ProbeResponse>, Status> {
        match self.readiness.ready().await {
            Ok(()) => Ok(Response::new(ProbeResponse { ready: Some(true) })),
            // What can be mended from outside; everything else is worth another try.
            Err(status) if status.code() == tonic::Code::FailedPrecondition => Err(status),
            Err(status) => {
                tracing::warn!(%status, "not ready");
                Ok(Response::new(ProbeResponse { ready: Some(false) }))
            }
        }
    }
}
